"""Which sequences are held out."""

import pytest

from fastmum.data.splits import held_out


@pytest.mark.parametrize(
    ("count", "share", "held"), [(20, 0.2, 4), (20, 0.01, 1), (2, 0.1, 1), (1, 0.5, 0), (9, 0, 0), (0, 0.5, 0)]
)
def test_how_many_are_held_out(count, share, held):
    found = held_out([f"s{i}" for i in range(count)], share)
    assert len(found) == held
    assert sorted(set(found.tolist())) == found.tolist()
    assert all(0 <= i < count for i in found.tolist())


def test_names_alone_decide():
    names = [f"s{i}" for i in range(50)]
    chosen = {names[i] for i in held_out(names, 0.3)}
    assert {names[::-1][i] for i in held_out(names[::-1], 0.3)} == chosen
    assert chosen != set(names[:15])
    assert {names[i] for i in held_out(names, 0.1)} < chosen
    fewer = names[:30]
    assert {fewer[i] for i in held_out(fewer, 0.5)} >= chosen & set(fewer), "both hold 15 out"
