"""What pictures show, in numbers: `fidelity`, `distances`, `intervals`, `pareto`, `machine`; and `report` (HTML)."""
