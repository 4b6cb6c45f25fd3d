"""How results are shown."""

from ctf.bench.tables import span, spread


def test_medians_with_their_spread() -> None:
    assert spread([3.0, 1.0, 2.0]) == "2.00 (1.00-3.00)"
    assert spread([3.0, 1.0, 2.0], " to ") == "2.00 (1.00 to 3.00)"
    assert span([3e9, 1e12]) == "3 to 1,000"
