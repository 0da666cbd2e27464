"""Write prompts in API format from Python."""

from typing import Any

Output = tuple[str, int]  # (node id, n): the n-th output of a node
SAMPLER = {"seed": 0, "steps": 25, "cfg": 4.0, "sampler_name": "euler", "scheduler": "normal"}


class Graph(dict[str, dict[str, Any]]):
    """A prompt in API format."""

    def add(self, class_type: str, title: str = "", **inputs: Any) -> str:
        """Add a node and return its id; (id, n) in `inputs` is the n-th output of another."""
        node = str(len(self) + 1)
        links = {name: list(v) if isinstance(v, tuple) else v for name, v in inputs.items()}
        self[node] = {"class_type": class_type, "inputs": links, "_meta": {"title": title}}
        return node

    def empty_latent(self, side: int, count: int) -> Output:
        """Add latents of `count` square pictures, `side` pixels wide."""
        return self.add("EmptyLatentImage", width=side, height=side, batch_size=count), 0

    def pictures(
        self, base: str, model: Output, text: str, latent: Output, title: str = "", **sampler: Any
    ) -> str:
        """Add a stock sampling of `text`; return the id of its Save Image node.

        base: a loader whose outputs are MODEL, CLIP and VAE. sampler: KSampler's own inputs.
        """
        positive = (self.add("CLIPTextEncode", clip=(base, 1), text=text), 0)
        negative = (self.add("CLIPTextEncode", clip=(base, 1), text=""), 0)
        wires = {"positive": positive, "negative": negative, "latent_image": latent}
        sampled = self.add("KSampler", model=model, **wires, **{**SAMPLER, **sampler})
        decoded = self.add("VAEDecode", samples=(sampled, 0), vae=(base, 2))
        return self.add("SaveImage", title, images=(decoded, 0), filename_prefix="picture")
