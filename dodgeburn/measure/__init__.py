"""What pictures show, in numbers with intervals: `fidelity`, `distances`, `intervals`, `machine`; and `report` (HTML)."""
