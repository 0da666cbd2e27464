"""One file per method. `METHODS` is the one list: nodes, loader and tests read it."""

from .a3ft import A3FT
from .apt import APT
from .attention import Attention
from .bnn import BNN
from .dreambooth import DreamBooth
from .lora import LoRA
from .para import PaRa
from .selective_zo import SelectiveZO

METHODS = {
    method.name: method
    for method in (LoRA, PaRa, DreamBooth, Attention, APT, BNN, A3FT, SelectiveZO)
}
