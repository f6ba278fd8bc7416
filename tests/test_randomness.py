from nldist.randomness import seed_of


def test_a_seed_is_its_name_s_and_stays_what_it_is() -> None:
    """A run goes on only while these are the same: a change needs a new REVISION."""
    assert seed_of(0, "train", "net0", "plan") == 0xC5300875102BD33C


def test_names_do_not_collide() -> None:
    names = [
        (s, stage, f"net{n}", what, epoch)
        for s in range(3)
        for stage in ("pretext", "train")
        for n in range(2)
        for what in ("plan", "view", "mix")
        for epoch in range(50)
    ]
    assert len({seed_of(*name) for name in names}) == len(names)
    assert seed_of(1, "a", 2) != seed_of(1, "a", 2, 0) != seed_of(11, "a", 2)
