"""Training without ComfyUI: torch, diffusers and peft in, a `Personalization` out."""
