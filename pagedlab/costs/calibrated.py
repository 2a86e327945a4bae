"""`Calibrated`: what a step costs by coefficients that were measured, and how they move to another card or
model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from math import exp, log
from typing import Any, ClassVar, Self

from pagedlab.costs.catalogue import find_hardware
from pagedlab.costs.linear import PS, LinearCost, Terms, coverage_table
from pagedlab.costs.roofline import Roofline
from pagedlab.errors import ConfigError
from pagedlab.policies.base import param
from pagedlab.registry import register

_HIGH = 1e9


@register("cost", "calibrated")
class Calibrated(LinearCost):
    """Coefficients fitted to measured steps or to the log of a real engine.

    With P prefill tokens, D decoding sequences, T = P + D, C tokens of their contexts and A query-key pairs of chunks::

        t = c0 + knee(w, c1 T) + c2 T + c3 C + c4 A + c5 D + c6 [P > 0]

    ``w`` is reading the weights (of a mixture of experts ``expert_share`` of it grows with the experts
    reached), ``c1`` compute and ``c2`` all-reduce per token, ``c3`` reading keys and values, ``c4`` attention
    of the chunks, ``c5`` whatever a decoding sequence adds, logits included, and ``c6`` what any step with
    prefill pays.

    The defaults are round numbers of the order of an 8 B model on one workstation card, fitted to nothing.
    Other starting points: `prior`, `scaled`, and `pagedlab.costs.fitting.fit_steps`.
    """

    c0: float = param(3.0, low=0.0, high=_HIGH, help="what every step takes", unit="ms")
    w: float = param(10.0, low=0.0, high=_HIGH, help="reading all weights", unit="ms")
    c1: float = param(30.0, low=0.0, high=_HIGH, help="compute per token", unit="µs")
    c2: float = param(0.0, low=0.0, high=_HIGH, help="all-reduces per token (tensor parallelism)", unit="µs")
    c3: float = param(100.0, low=0.0, high=_HIGH, help="reading one token of decoding context", unit="ns")
    c4: float = param(2.0, low=0.0, high=_HIGH, help="one query-key pair of a prompt chunk", unit="ns")
    c5: float = param(5.0, low=0.0, high=_HIGH, help="one decoding sequence beside its keys", unit="µs")
    c6: float = param(5.0, low=0.0, high=_HIGH, help="what a step with prefill takes more", unit="ms")
    knee: str = param(
        "max", choices=("max", "hypot"), help="how w and c1 T become one: the larger, or softly"
    )
    experts: int = param(0, low=0, high=1 << 16, help="routed experts of a layer; 0: a dense model")
    experts_per_token: int = param(0, low=0, high=1 << 16, help="of those, how many a token uses")
    expert_share: float = param(0.0, low=0.0, high=1.0, help="share of w that is routed experts")
    host_gb_per_s: float = param(
        25.0, low=1e-6, high=_HIGH, help="copies to and from host memory", unit="GB/s"
    )
    host_latency_us: float = param(10.0, low=0.0, high=_HIGH, help="what such a copy takes beside", unit="µs")
    disk_read_gb_per_s: float = param(
        5.0, low=1e-6, high=_HIGH, help="reading from the disk tier", unit="GB/s"
    )
    disk_write_gb_per_s: float = param(
        2.5, low=1e-6, high=_HIGH, help="writing to the disk tier", unit="GB/s"
    )
    disk_latency_us: float = param(
        100.0, low=0.0, high=_HIGH, help="what reading or writing takes beside", unit="µs"
    )

    VECTOR: ClassVar[tuple[str, ...]] = ("c0", "w", "c1", "c2", "c3", "c4", "c5", "c6")
    """The coefficients in the order of `to_vector`."""
    FLOOR: ClassVar[float] = 1e-6
    """In the vector, what stands for zero (in the coefficient's unit): logarithms know none."""

    def __post_init__(self) -> None:
        if self.experts and not 1 <= self.experts_per_token <= self.experts:
            raise ConfigError(
                f"Calibrated.experts_per_token = {self.experts_per_token} is out of range; allowed: 1 to {self.experts}"
            )
        super().__post_init__()

    def terms(self) -> Terms:
        """Return the coefficients in picoseconds, the slope rounded to a whole number."""
        ms, us, ns = 1e9, 1e6, 1e3
        experts = self.w * self.expert_share if self.experts else 0.0
        return Terms(
            overhead=self.c0 * ms,
            weights=(self.w - experts) * ms,
            experts=experts * ms,
            coverage=coverage_table(self.experts, self.experts_per_token) if self.experts else (),
            token=self.c1 * us,
            head=0.0,
            logits=0.0,
            link=self.c2 * us,
            sequence=self.c5 * us,
            pair=self.c4 * ns,
            prefill=self.c6 * ms,
            soft=self.knee == "hypot",
            context=round(self.c3 * ns),
        )

    def links(self) -> dict[str, tuple[float, int]]:
        """Return rates and latencies of the host link and the disk."""
        disk_latency = round(self.disk_latency_us * 1e6)
        return {
            "host": (self.host_gb_per_s * 1e9 / PS, round(self.host_latency_us * 1e6)),
            "disk-read": (self.disk_read_gb_per_s * 1e9 / PS, disk_latency),
            "disk-write": (self.disk_write_gb_per_s * 1e9 / PS, disk_latency),
        }

    # ---- where it comes from ---------------------------------------------------------------------------------------

    @classmethod
    def from_roofline(cls, roofline: Roofline) -> Self:
        """Return what the catalogue says in this form.

        The output head is counted with the weights, and its logits with the decoding sequences, so the two
        models differ slightly in steps that sample little or very much.
        """
        t = roofline.terms()
        (rate, latency), (read, disk_latency), (write, _) = roofline.links().values()
        shape = roofline.shape
        weights = t.weights + t.experts + t.head
        return cls(
            c0=t.overhead / 1e9,
            w=weights / 1e9,
            c1=t.token / 1e6,
            c2=t.link / 1e6,
            c3=t.context / 1e3,
            c4=t.pair / 1e3,
            c5=(t.sequence + t.logits) / 1e6,
            c6=t.prefill / 1e9,
            knee="hypot" if t.soft else "max",
            experts=shape.experts,
            experts_per_token=shape.experts_per_token,
            expert_share=t.experts / weights,
            host_gb_per_s=rate * PS / 1e9,
            host_latency_us=latency / 1e6,
            disk_read_gb_per_s=read * PS / 1e9,
            disk_write_gb_per_s=write * PS / 1e9,
            disk_latency_us=disk_latency / 1e6,
        )

    @classmethod
    def prior(cls, model: str, hardware: str, tensor_parallel: int = 1, **roofline: Any) -> Self:
        """Return what to expect before anything is measured: the `Roofline` of that model and hardware."""
        return cls.from_roofline(
            Roofline(model=model, hardware=hardware, tensor_parallel=tensor_parallel, **roofline)
        )

    def scaled(
        self,
        to_model: str,
        to_hardware: str,
        *,
        from_model: str,
        from_hardware: str,
        to_tp: int = 1,
        from_tp: int = 1,
        bandwidth_ratio: float | None = None,
        compute_ratio: float | None = None,
        **roofline: Any,
    ) -> Self:
        """Return these coefficients moved to another model and card by the ratios of the catalogue.

        Each is multiplied by what the rooflines say of both sides: ``w`` by bytes of weights over bandwidth,
        ``c1`` and ``c4`` by FLOPs over compute, ``c3`` by bytes of cache over bandwidth, ``c0`` and ``c6`` by
        the layers' host constants, ``c2`` by all-reduced bytes over the link. A coefficient that is 0 here
        and in the roofline it comes from (all-reduces, on one accelerator) is taken from the roofline it goes
        to. ``bandwidth_ratio`` and ``compute_ratio`` (new over old) replace the datasheets' where they have
        been measured: slopes differ less than datasheets promise. ``roofline`` sets further parameters of
        both rooflines. Moving to the same place changes nothing.
        """
        old = type(self).prior(from_model, from_hardware, from_tp, **roofline)
        new = type(self).prior(to_model, to_hardware, to_tp, **roofline)
        here, there = find_hardware(from_hardware), find_hardware(to_hardware)
        slower = {
            **dict.fromkeys(("w", "c3"), _correction(there.bandwidth / here.bandwidth, bandwidth_ratio)),
            **dict.fromkeys(("c1", "c4"), _correction(there.flops / here.flops, compute_ratio)),
        }
        values: dict[str, float] = {}
        for name in self.VECTOR:
            mine, was, becomes = getattr(self, name), getattr(old, name), getattr(new, name)
            if was > 0:
                values[name] = mine * (becomes / was) * slower.get(name, 1.0)
            else:
                values[name] = mine or becomes * slower.get(name, 1.0)
        mixture: dict[str, Any] = {}
        if (new.experts, new.experts_per_token, new.expert_share) != (
            old.experts,
            old.experts_per_token,
            old.expert_share,
        ):
            mixture = {k: getattr(new, k) for k in ("experts", "experts_per_token", "expert_share")}
        links = ("host_gb_per_s", "disk_read_gb_per_s", "disk_write_gb_per_s")
        rates = {name: getattr(self, name) * (getattr(new, name) / getattr(old, name)) for name in links}
        return self.clone(**values, **mixture, **rates)

    # ---- as a vector, for fits that have to simulate ---------------------------------------------------------------

    def to_vector(self) -> list[float]:
        """Return the natural logarithms of `VECTOR`'s coefficients, each in its unit; zero becomes
        log(`FLOOR`).
        """
        return [log(max(getattr(self, name), self.FLOOR)) for name in self.VECTOR]

    @classmethod
    def from_vector(cls, vector: Sequence[float], like: Calibrated | None = None) -> Calibrated:
        """Return the model that `to_vector` wrote, with ``like``'s other parameters (default: the class's).

        Raises `ConfigError` if the vector is of another length.
        """
        if len(vector) != len(cls.VECTOR):
            raise ConfigError(
                f"a vector of {', '.join(cls.VECTOR)} has {len(cls.VECTOR)} numbers, not {len(vector)}"
            )
        barely = cls.FLOOR * (1 + 1e-9)
        values = {name: 0.0 if (value := exp(x)) <= barely else value for name, x in zip(cls.VECTOR, vector)}
        return (cls.from_params({}) if like is None else like).clone(**values)

    def bounds(self, factor: float = 50.0) -> list[tuple[float, float]]:
        """Return (low, high) for each number of the vector: ``factor`` below and above this model's.

        A coefficient that is zero here stays zero.
        """
        if factor <= 1:
            raise ConfigError(f"factor must be above 1, not {factor}")
        reach = log(factor)
        at_floor = log(self.FLOOR)
        return [
            (x - reach, x + reach) if getattr(self, name) > self.FLOOR else (at_floor, at_floor)
            for name, x in zip(self.VECTOR, self.to_vector())
        ]

    # ---- as text ---------------------------------------------------------------------------------------------------

    def to_json(self) -> str:
        """Return the model as JSON, to be read by `from_json`."""
        return json.dumps({"cost": self.name, "params": self.get_params()}, indent=2)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` wrote; `ConfigError` says what is wrong with anything else."""
        try:
            data = json.loads(text)
        except ValueError as error:
            raise ConfigError(f"not a calibrated cost model: {error}") from None
        if (
            not isinstance(data, Mapping)
            or data.get("cost") != cls.name
            or not isinstance(data.get("params"), dict)
        ):
            raise ConfigError(
                f'not a calibrated cost model: it must say {{"cost": "{cls.name}", "params": {{...}}}}'
            )
        return cls.from_params(data["params"])

    def __repr__(self) -> str:
        units = {p.name: p.unit for p in self.params()}
        said = [
            f"{name}={getattr(self, name):.4g} {units[name]}" for name in self.VECTOR if getattr(self, name)
        ]
        said.append(f"knee={self.knee}")
        if self.experts:
            said.append(f"experts={self.experts_per_token}/{self.experts}, {self.expert_share:.0%} of w")
        return f"{type(self).__name__}({', '.join(said)})"


def _correction(published: float, measured: float | None) -> float:
    """Return the factor that turns a time scaled by the ``published`` ratio of rates into one by the
    measured.
    """
    if measured is None:
        return 1.0
    if not measured > 0:
        raise ConfigError(f"a measured ratio must be above 0, not {measured}")
    return published / measured
