"""Initialisation that keeps the variance of signals and gradients through any depth.

Where things are:

- single tensors: `schemes`, `orthogonal`, `fans`, `gains`;
- what a call asks for: `call`, `settings`, `overrides`, `axes`;
- how a model is read: `auto` (all that a recorded forward pass tells, as `advice`), `guess` and `module_order` where
  there is no sample; for it `paths` and `replay` (what lies between two weights), `surroundings`, `tables`, `composed`,
  `deliberate`, `critical`, `recurrence`, `residual`;
- what it leads to: `prediction` (with `flow`, `curves`) and its `verdict`;
- who decides and draws: `owned` and `parametrized` (what the parameters are), `handlers`, `context`, `decide`,
  `drawing`, `blocks`, `parts`, `plan`;
- afterwards: `calibration`; on the meta device `binding` and `stand_ins`.
"""

from lightning_gradhealth.init.axes import Axes
from lightning_gradhealth.init.context import InitContext
from lightning_gradhealth.init.fans import Fans, fans
from lightning_gradhealth.init.gains import gain
from lightning_gradhealth.init.handlers import register_initializer
from lightning_gradhealth.init.orthogonal import delta_orthogonal_
from lightning_gradhealth.init.plan import InitPlan, init_weights, plan_init
from lightning_gradhealth.init.schemes import (
    glorot_normal_,
    glorot_uniform_,
    he_normal_,
    he_uniform_,
    kaiming_normal_,
    kaiming_uniform_,
    lecun_normal_,
    lecun_uniform_,
    variance_scaling_,
    xavier_normal_,
    xavier_uniform_,
)

__all__ = [
    "Axes",
    "Fans",
    "InitContext",
    "InitPlan",
    "delta_orthogonal_",
    "fans",
    "gain",
    "glorot_normal_",
    "glorot_uniform_",
    "he_normal_",
    "he_uniform_",
    "init_weights",
    "kaiming_normal_",
    "kaiming_uniform_",
    "lecun_normal_",
    "lecun_uniform_",
    "plan_init",
    "register_initializer",
    "variance_scaling_",
    "xavier_normal_",
    "xavier_uniform_",
]
