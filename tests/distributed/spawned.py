"""A fit under ddp_spawn, as a script: what each rank has seen is left in the folder that is given."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import fits
import torch

if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    fits.run("ddp_spawn", fits.ADAPTIVE, Path(sys.argv[1]))
