"""LoRA adapters: attach, save, load, switch, fuse."""
