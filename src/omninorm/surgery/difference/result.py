"""The result of a comparison: every matched module with its differences, and sentences about where they begin."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from omninorm.record.jsonl import json_values
from omninorm.surgery.difference.measure import percent


@dataclass(frozen=True)
class ModuleDifference:
    """A module of a and its counterpart in b.

    Args:
        a, b: their names; empty for the models themselves.
        class_a, class_b: their classes.
        call: 1 for the module's first call, 2 for its second.
        inputs, outputs: the relative differences ‖a − b‖/‖a‖ of what they received and returned in their own models.
        fed: that of the outputs if b's module receives a's input; None if it cannot.
        not_fed: why it cannot.
        argument: the input that differs the most.
        parts: whether the models part here: the inputs are equal or made equal, and the outputs differ.
        nonfinite: "a", "b" or "both" return NaN or infinite values for finite inputs.
        reasons: what differs between the modules themselves, such as a weight or a setting; only if the models part
            here.
        index, last: the numbers of a's calls that began before it and before its end.
        begins: the same for the first module inside of it that receives another input; `index` if there is none.
        compensated: whether a module around it agrees although it differs, because its work was rearranged, such as a
            factor that moved from one weight to another. It then counts as no difference.
    """

    a: str
    b: str
    class_a: str
    class_b: str
    call: int
    inputs: float
    outputs: float
    fed: float | None
    not_fed: str = ""
    argument: str = ""
    parts: bool = False
    nonfinite: str = ""
    reasons: tuple[str, ...] = ()
    index: int = 0
    last: int = 0
    begins: int = 0
    compensated: bool = False

    @property
    def size(self) -> float:
        """The difference of the outputs for the same input, where it is known, and that in the models otherwise."""
        return self.outputs if self.fed is None else self.fed

    @property
    def label(self) -> str:
        """The name in a, and the name in b if it is another one."""
        ours = self.a or "the model itself"
        again = f" (call {self.call})" if self.call > 1 else ""
        return ours + again if self.a == self.b else f"{ours}{again} ({self.b or 'the whole model'} in b)"


@dataclass(frozen=True)
class FirstDifference:
    """Where two models first part.

    Args:
        kind: "equal", "rounding" (no module differs by more than rounding), or "different".
        modules: the matched modules, in the order in which a calls them.
        culprits: those in which the models part, in order; empty unless `kind` is "different".
        only_a, only_b: modules without a counterpart.
        exact: relative differences up to this count as none.
        rounding: relative differences of one module up to this count as rounding.
        same_class: the same where both modules are of the same class.
        dtype: the dtype in which the models ran, or "as they are".
        rounded_weights: the dtypes to which weights of one model were rounded in the other.
        inputs: what the models were run on.
    """

    kind: str
    modules: tuple[ModuleDifference, ...]
    culprits: tuple[ModuleDifference, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    exact: float
    rounding: float
    same_class: float
    dtype: str
    rounded_weights: tuple[str, ...]
    inputs: str

    @property
    def first(self) -> ModuleDifference | None:
        """The first module in which the models part."""
        return self.culprits[0] if self.culprits else None

    @property
    def largest(self) -> float:
        """The largest relative difference of the outputs of any matched module that is not compensated."""
        return max((each.outputs for each in self._counted), default=0.0)

    @property
    def _counted(self) -> list[ModuleDifference]:
        return [each for each in self.modules if not each.compensated]

    @property
    def verdict(self) -> str:
        """One sentence."""
        count = _modules(len(self._counted), "matched ")
        if self.kind == "equal":
            most = f": at most {percent(self.largest)}" if self.largest else ""
            return f"No difference in {count}{most}."
        if self.first is not None:
            return f"They first part in {self.first.label}: {_how(self.first, self.exact)}; {self._before()}."
        worst = max(self._counted, key=lambda each: each.outputs)
        alone = max((each.fed for each in self._counted if each.fed is not None), default=0.0)
        text = f"They differ by no more than rounding in {count}: {percent(worst.outputs)} in {worst.label}"
        return f"{text}, and {percent(alone)} at most for the same input."

    @property
    def allowance(self) -> str:
        """What counts as rounding, in words."""
        if self.same_class == self.rounding:
            return f"up to {self.rounding:.2g} for one module"
        return f"up to {self.same_class:.2g} for one module, {self.rounding:.2g} if the classes differ"

    @property
    def _rounded(self) -> list[str]:
        dtypes = " and ".join(self.rounded_weights)
        return [f"Weights of one model are the other's, rounded to {dtypes}."] if dtypes else []

    @property
    def details(self) -> tuple[str, ...]:
        """More sentences: what differs in the modules where they part, which others there are, what has no match."""
        found = self._rounded
        if self.first is not None:
            found += [f"In {self.first.a or 'the model itself'}, {each}." for each in self.first.reasons]
        if len(self.culprits) > 1:
            others = [each.label for each in self.culprits[1:]]
            found.append(f"{_modules(len(others), 'more ')} {_verb('differ', len(others))} as well: {_some(others)}.")
        if rearranged := [each.label for each in self.modules if each.compensated]:
            found.append(f"Rearranged, because a module around them agrees: {_some(rearranged)}.")
        for which, names in (("a", self.only_a), ("b", self.only_b)):
            if names and self.first is not None:
                found.append(f"{_modules(len(names))} of {which} without a counterpart: {_some(names)}.")
        return tuple(found)

    def _before(self) -> str:
        assert self.first is not None
        agreeing = [each.outputs for each in self._counted if each.last < self.first.begins]
        if not agreeing:
            return "no matched module comes before it"
        verb = _verb("agree", len(agreeing))
        most = max(agreeing)
        return f"before it {_modules(len(agreeing))} {verb} {f'to {percent(most)}' if most else 'exactly'}"

    def to_record(self) -> dict[str, Any]:
        """Return everything as plain data for JSON; numbers that are not finite become texts such as "inf"."""
        record: dict[str, Any] = asdict(self)
        for name in ("modules", "culprits"):
            record[name] = [{"label": each.label, **asdict(each)} for each in getattr(self, name)]
        record |= {
            "verdict": self.verdict,
            "allowance": self.allowance,
            "details": list(self.details),
            "largest": self.largest,
        }
        found: dict[str, Any] = json_values(record)
        return found


def _how(each: ModuleDifference, exact: float) -> str:
    equal = each.inputs <= exact
    given = "same inputs" if equal else "fed the same input" if each.fed is not None else "almost the same inputs"
    if each.nonfinite:
        which = {"a": "a returns", "b": "b returns", "both": "both return"}[each.nonfinite]
        return f"{given}, {which} NaN or infinite values"
    return f"{given}, outputs differ by {percent(each.size)} (norm)"


def _modules(count: int, kind: str = "") -> str:
    return f"{count} {kind}module{'' if count == 1 else 's'}"


def _verb(verb: str, count: int) -> str:
    return f"{verb}s" if count == 1 else verb


def _some(names: Sequence[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
