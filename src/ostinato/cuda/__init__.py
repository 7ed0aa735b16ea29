"""What runs on a GPU: torch's own cuDNN operator (`ostinato.cuda.cudnn`)."""
