"""SO-LoRA: fine-tuning between wireless peers that exchange sparse slices, without a server."""
