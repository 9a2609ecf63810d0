"""Checkpoints that are complete or not there, and Hugging Face weights in and out.

save / load    write, rotate, list, verify and read the checkpoints of a run folder
storage        the files of one checkpoint, as a storage back end of torch.distributed.checkpoint
hf             import and export of Hugging Face folders, safetensors only
rng            state of the random number generators, as JSON
signals, lock  stop requests by signal; one process per run folder
"""
