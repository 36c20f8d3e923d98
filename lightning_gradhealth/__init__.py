"""Training health for PyTorch Lightning: per-layer gradient norms, diagnoses with remedies, and initialisation.

The public names are loaded on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_gradhealth.callback import (
        GradHealth as GradHealth,
    )
    from lightning_gradhealth.errors import (
        GradHealthError as GradHealthError,
        NonFiniteGradientError as NonFiniteGradientError,
    )
    from lightning_gradhealth.flows import (
        ChainPoint as ChainPoint,
        SignalChain as SignalChain,
        TemporalFlow as TemporalFlow,
    )
    from lightning_gradhealth.gradients import (
        Chain as Chain,
        Clipper as Clipper,
        Cut as Cut,
        Decision as Decision,
        GradientMonitor as GradientMonitor,
        Gradients as Gradients,
        LayerwiseClip as LayerwiseClip,
        NormClip as NormClip,
        PercentileClip as PercentileClip,
        SignClip as SignClip,
        UnitwiseClip as UnitwiseClip,
        ValueClip as ValueClip,
        WhenExploding as WhenExploding,
        ZScoreClip as ZScoreClip,
    )
    from lightning_gradhealth.init import (
        Axes as Axes,
        Fans as Fans,
        InitContext as InitContext,
        InitPlan as InitPlan,
        delta_orthogonal_ as delta_orthogonal_,
        fans as fans,
        gain as gain,
        glorot_normal_ as glorot_normal_,
        glorot_uniform_ as glorot_uniform_,
        he_normal_ as he_normal_,
        he_uniform_ as he_uniform_,
        init_weights as init_weights,
        kaiming_normal_ as kaiming_normal_,
        kaiming_uniform_ as kaiming_uniform_,
        lecun_normal_ as lecun_normal_,
        lecun_uniform_ as lecun_uniform_,
        plan_init as plan_init,
        register_initializer as register_initializer,
        variance_scaling_ as variance_scaling_,
        xavier_normal_ as xavier_normal_,
        xavier_uniform_ as xavier_uniform_,
    )
    from lightning_gradhealth.metrics import (
        DeadUnitFraction as DeadUnitFraction,
        GradientNorm as GradientNorm,
        GradientNormRatio as GradientNormRatio,
        SaturatedUnitFraction as SaturatedUnitFraction,
        SignalGain as SignalGain,
    )
    from lightning_gradhealth.preflight import (
        diagnose as diagnose,
    )
    from lightning_gradhealth.records import (
        Condition as Condition,
        DepthPoint as DepthPoint,
        Finding as Finding,
        FlowReport as FlowReport,
        HealthReport as HealthReport,
        InitEntry as InitEntry,
        InitReport as InitReport,
        LayerStats as LayerStats,
        OptimizerStats as OptimizerStats,
        Severity as Severity,
        StepRecord as StepRecord,
        StepStats as StepStats,
    )
    from lightning_gradhealth.rules import (
        Rule as Rule,
        Thresholds as Thresholds,
        Verdict as Verdict,
    )
    from lightning_gradhealth.session import (
        HealthSession as HealthSession,
    )
    from lightning_gradhealth.signals import (
        temporal_flow as temporal_flow,
    )

__version__ = "0.1.0"

_HOMES = {
    "callback": ("GradHealth",),
    "session": ("HealthSession",),
    "preflight": ("diagnose",),
    "signals": ("temporal_flow",),
    "flows": ("ChainPoint", "SignalChain", "TemporalFlow"),
    "metrics": ("DeadUnitFraction", "GradientNorm", "GradientNormRatio", "SaturatedUnitFraction", "SignalGain"),
    "errors": ("GradHealthError", "NonFiniteGradientError"),
    "gradients": (
        "Chain",
        "Clipper",
        "Cut",
        "Decision",
        "GradientMonitor",
        "Gradients",
        "LayerwiseClip",
        "NormClip",
        "PercentileClip",
        "SignClip",
        "UnitwiseClip",
        "ValueClip",
        "WhenExploding",
        "ZScoreClip",
    ),
    "rules": ("Rule", "Thresholds", "Verdict"),
    "records": (
        "Condition",
        "DepthPoint",
        "Finding",
        "FlowReport",
        "HealthReport",
        "InitEntry",
        "InitReport",
        "LayerStats",
        "OptimizerStats",
        "Severity",
        "StepRecord",
        "StepStats",
    ),
    "init": (
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
    ),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = ["__version__", *sorted(_HOME_OF)]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    """Import a public name from its module on first use (PEP 562)."""
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
