"""What a run will take, told on a CPU before anything is allocated: work, time and memory on any mesh."""
