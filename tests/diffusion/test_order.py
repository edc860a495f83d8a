from spo.diffusion.noise import shuffled


def test_every_item_once_an_epoch() -> None:
    stream = shuffled(7, 0, 21, seed=0)
    assert [epoch for epoch, _ in stream] == [0] * 7 + [1] * 7 + [2] * 7
    epochs = [[item for e, item in stream if e == epoch] for epoch in range(3)]
    assert all(sorted(items) == list(range(7)) for items in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_a_position_never_depends_on_how_the_stream_is_cut() -> None:
    stream = shuffled(7, 0, 30, seed=3)
    assert [x for start in range(0, 30, 5) for x in shuffled(7, start, 5, seed=3)] == stream
    assert shuffled(7, 4, 20, seed=3) == stream[4:24]


def test_seeds_differ() -> None:
    assert shuffled(20, 0, 20, seed=0) != shuffled(20, 0, 20, seed=1)
