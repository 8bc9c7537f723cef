"""The silo daemon: CLIP, data and private prompts stay here."""
