"""ComfyUI's side of the fence: the only package that imports it."""
