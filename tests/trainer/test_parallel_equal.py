"""Replicated or sharded, a gang trains as one process does on all of its samples, and hands its state on to others."""


def test_every_strategy_trains_as_one_process(gang):
    """Accumulation, clipping, and a last batch in which one rank has more samples than the other."""
    names = ["ddp", "static", "fsdp", "sized"]
    for rank in gang.ok(2, "parallel_equal.py", *names, timeout=100):
        assert rank.stdout.split("\n")[: len(names)] == [f"equal {name}" for name in names]


def test_copies_of_shards_train_as_one_process(gang):
    for rank in gang.ok(4, "parallel_equal.py", "hsdp", timeout=100):
        assert rank.stdout == "equal hsdp\n"
