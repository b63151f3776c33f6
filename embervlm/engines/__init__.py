"""Engines that run a training step. DeepSpeed and FSDP are named in one file each."""
