"""Before the first step: one batch forward and backward, and what it shows.

- `diagnosis`: the two entrances, `diagnose` for users and `examine` for the callback;
- `ends`: what a forward pass ends in, and what to say of a batch that does not go through;
- `passes`: one pass forward and backward, measured on the device;
- `account`: from the numbers to the report;
- `remedies`: what `init_weights` would change.
"""

from lightning_gradhealth.preflight.diagnosis import diagnose, examine
from lightning_gradhealth.preflight.ends import copied, of_step

__all__ = ["copied", "diagnose", "examine", "of_step"]
