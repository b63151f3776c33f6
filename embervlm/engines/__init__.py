"""What runs a training step. DeepSpeed and FSDP are named in one file each."""
