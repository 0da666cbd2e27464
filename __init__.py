"""Personalize: train personal diffusion models from a few images, inside the graph."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """Give ComfyUI the pack's nodes; imports happen here, so that tests can import parts."""
    from .nodes.extension import PersonalizeExtension

    return PersonalizeExtension()
