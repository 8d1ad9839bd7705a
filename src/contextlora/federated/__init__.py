"""SO-LoRA: fine-tuning between wireless peers, without a server."""
