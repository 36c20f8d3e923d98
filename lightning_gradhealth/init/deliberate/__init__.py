"""What somebody has set on purpose, as no class and no rule would: it stays as it is, with the reason.

`values` tells it by what stands there, `traced` by the place it has in the forward pass, `periodic` by what follows;
`copies` finds what was copied to follow something that is trained.
"""

from lightning_gradhealth.init.deliberate.copies import copies_in
from lightning_gradhealth.init.deliberate.periodic import Waves, waves
from lightning_gradhealth.init.deliberate.traced import at_the_end, meant_in, second_of_pair
from lightning_gradhealth.init.deliberate.values import is_zero, scale_of

__all__ = ["Waves", "at_the_end", "copies_in", "is_zero", "meant_in", "scale_of", "second_of_pair", "waves"]
