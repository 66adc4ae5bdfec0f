"""Sharding with the meta device, mixed precision, an overflow on one rank, offload, and running statistics."""


def test_sharded_models_keep_what_whole_ones_have(gang):
    for rank in gang.ok(2, "sharded_models.py", timeout=100):
        assert rank.stdout == "kept\n"
