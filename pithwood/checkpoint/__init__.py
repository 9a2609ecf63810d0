"""Checkpoints that are complete or not there, and Hugging Face weights in and out.

save / load    write, rotate, list, verify and read the checkpoints of a run folder, on one process or a mesh
background     save while the training goes on
ranges         what a process holds of a tensor, what files hold, whether all is there once
storage        the files of one checkpoint
together       how the processes of a mesh agree on a checkpoint
hf             import and export of Hugging Face folders, safetensors only
rng            state of the random number generators, as JSON
signals, lock  stop requests by signal; one process per run folder
"""
