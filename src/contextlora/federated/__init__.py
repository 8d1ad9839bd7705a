"""SO-LoRA: fine-tuning between wireless peers, without a server (SEMANTICS section 4)."""
