"""What the page of each measure shows. A view turns findings into sections; their tables are the console's too."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from contextlora.reports.grids import Section
from contextlora.reports.tables import Findings
from contextlora.reports.views import accuracy, federations, inference, masks, mechanism, repair

VIEWS: Mapping[str, Callable[[Findings], list[Section]]] = {
    "accuracy": accuracy.sections,
    "inference": inference.sections,
    "masks": masks.sections,
    "repair": repair.sections,
    "federated": federations.federated,
    "layers": federations.layers,
    "collisions": federations.collisions,
    "radio": federations.radio,
    "mechanism": mechanism.sections,
}


def sections(findings: Findings) -> list[Section]:
    """The sections of a comparison's page that its measure decides."""
    return VIEWS[findings.recipe.measure](findings)
