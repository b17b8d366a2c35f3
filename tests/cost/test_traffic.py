import time
from fractions import Fraction

import pytest

from shardlab.cost.network import communication
from shardlab.cost.traffic import traffic_of
from shardlab.errors import UserError
from shardlab.hardware.machine import Chip, Domain, Machine

GPU = Chip(name="gpu", family="gpu", memory_bytes=80 * 10**9, pool_fraction=0.75)
TPU = Chip(name="tpu", family="tpu", memory_bytes=95 * 10**9)


def gpus(hosts, per_host=8, nvlink=450e9, nic=50e9):
    domains = (
        Domain(tier="nvlink", size=per_host, bytes_per_s=nvlink),
        Domain(tier="infiniband", size=hosts * per_host, bytes_per_s=nic),
    )
    return Machine(spec="gpus", chip=GPU, num_devices=hosts * per_host, domains=domains, hosts=hosts)


def three_levels():
    """Sites of 4 hosts of 2 devices: 16 devices, 2 sites."""
    sizes = {"nvlink": (2, 100e9), "infiniband": (8, 10e9), "wan": (16, 1e9)}
    domains = tuple(Domain(tier=tier, size=size, bytes_per_s=rate) for tier, (size, rate) in sizes.items())
    return Machine(spec="sites", chip=GPU, num_devices=16, domains=domains, hosts=8)


def tpus(torus, wraps, slices=1, link=90e9, dcn=6.25e9, chip=TPU):
    size = chip.xla_devices
    for extent in torus:
        size *= extent
    domains = (Domain(tier="ici", size=size, bytes_per_s=link),)
    if slices > 1:
        domains += (Domain(tier="dcn", size=size * slices, bytes_per_s=dcn),)
    count = size * slices
    return Machine(
        spec="tpus", chip=chip, num_devices=count, domains=domains, slices=slices, torus=torus, wraps=wraps
    )


FACTORS = {"all-reduce": 2, "all-gather": 1, "reduce-scatter": 1, "all-to-all": 1}


def traffic(kind, payload, machine, groups=(), pairs=(), device_ids=None, wire=None):
    n = max((len(group) for group in groups), default=2)
    if wire is None:
        wire = FACTORS[kind] * Fraction(n - 1, n) * payload if kind in FACTORS else Fraction(payload)
    return traffic_of(
        kind=kind,
        payload_bytes=payload,
        wire_bytes=Fraction(wire),
        groups=groups,
        pairs=pairs,
        machine=machine,
        device_ids=device_ids,
    )


@pytest.mark.parametrize(("kind", "rounds"), [("all-gather", 1), ("reduce-scatter", 1), ("all-reduce", 2)])
def test_64_way_group_on_8_hosts_of_8(kind, rounds):
    # DESIGN section 3: (g-1)/g · S over NVLink and (N-1)/N · S/g per NIC, g = 8 chips in each of N = 8 hosts.
    S = 64 << 20
    result = traffic(kind, S, gpus(8), [range(64)])
    nvlink, nic = rounds * Fraction(7, 8) * S, rounds * Fraction(7, 8) * S / 8
    assert result.tiers == {"nvlink": nvlink, "infiniband": nic}
    assert sum(result.tiers.values()) == rounds * Fraction(63, 64) * S
    assert result.tier == "infiniband"
    # NCCL carries it out as rings through all 64 GPUs: per NIC (n-1)/n · S/g, more than the hierarchy needs.
    assert result.algorithm == {"name": "ring", "from": "model"}
    ring = rounds * 63 / 64 * S / 8
    assert result.tier_s == pytest.approx({"nvlink": float(nvlink) / 450e9, "infiniband": ring / 50e9})
    assert result.time_s == max(result.tier_s.values())


@pytest.mark.parametrize("kind", FACTORS)
@pytest.mark.parametrize(
    ("groups", "tier"),
    [
        pytest.param([range(8), range(8, 16)], "nvlink", id="inside-a-host"),
        pytest.param([range(0, 16, 8), range(1, 16, 8)], "infiniband", id="one-device-per-host"),
        pytest.param([(0, 1, 2, 3), (4, 5, 6, 7)], "nvlink", id="half-a-host"),
    ],
)
def test_one_domain_level_carries_all_wire_bytes(kind, groups, tier):
    n = len(groups[0])
    result = traffic(kind, 4096, gpus(2), groups)
    assert result.tiers == {tier: FACTORS[kind] * Fraction(n - 1, n) * 4096}
    assert result.tier == tier
    assert result.algorithm["name"] == ("direct" if kind == "all-to-all" else "ring")


def test_three_levels_recursively():
    # r = (2, 4, 2), n = 16. All-gather of S = 1600 from shards of 100 bytes: across sites first, 1 shard to
    # the peer;
    # then each of 4 hosts holds 2 shards and sends them to 3 others in turn: 3 · 200; then 8 shards to the
    # neighbour: 800.
    result = traffic("all-gather", 1600, three_levels(), [range(16)])
    assert result.tiers == {"nvlink": 800, "infiniband": 600, "wan": 100}
    assert sum(result.tiers.values()) == 15 * 100
    assert result.tier == "wan"
    assert result.time_s == pytest.approx(
        15 * 100 / 8 / 1e9
    )  # NCCL's rings: 15 pieces, in the 8 GPUs of a site


def test_levels_that_a_group_skips_carry_nothing():
    # Devices 0 and 8: the same place in two sites.
    assert traffic("all-reduce", 1000, three_levels(), [(0, 8)]).tiers == {"wan": 1000}


def test_all_to_all_by_destination():
    # 16 devices on 2 hosts: of 15 peers 7 are inside the host, 8 outside; each gets S/16.
    result = traffic("all-to-all", 1600, gpus(2), [range(16)])
    assert result.tiers == {"nvlink": 700, "infiniband": 800}


def test_ragged_all_to_all_may_send_everything_anywhere():
    result = traffic("ragged-all-to-all", 1600, gpus(2), [range(16)])
    assert result.tiers == {"nvlink": 1600, "infiniband": 1600}


def test_broadcast_crosses_every_level_once():
    result = traffic("collective-broadcast", 500, gpus(2), [range(16)])
    assert result.tiers == {"nvlink": 500, "infiniband": 500}


def test_uneven_spread_is_a_stated_upper_bound():
    # 3 devices in one host, 1 in the other: a flat ring, in which some device sends everything over each
    # tier.
    result = traffic("all-reduce", 4000, gpus(2), [(0, 1, 2, 8)])
    assert result.tiers == {"nvlink": 6000, "infiniband": 6000}
    assert result.algorithm["name"] == "flat"


def test_uneven_groups_use_each_group_s_own_size():
    # All-reduce of 1200: the pair across hosts sends 2·1/2·1200, the four in a host 2·3/4·1200 (the
    # busiest: wire_bytes).
    result = traffic("all-reduce", 1200, gpus(2), [(0, 8), (1, 2, 3, 4)], wire=1800)
    assert result.tiers == {"infiniband": 1200, "nvlink": 1800}
    # All-gather of one operand of 100 bytes each: 1 · 100 and 3 · 100.
    result = traffic("all-gather", 400, gpus(2), [(0, 8), (1, 2, 3, 4)], wire=300)
    assert result.tiers == {"infiniband": 100, "nvlink": 300}


def test_permute_by_pair_and_busiest_device():
    # A ring through 2 hosts: all but two hops stay inside; one device sends one message, so either tier
    # sees S.
    ring = [(i, (i + 1) % 16) for i in range(16)]
    result = traffic("collective-permute", 100, gpus(2), pairs=ring)
    assert result.tiers == {"nvlink": 100, "infiniband": 100}
    assert result.tier == "infiniband"
    assert traffic("send", 100, gpus(2), pairs=[(0, 1), (8, 9)]).tiers == {"nvlink": 100}
    # In-place permutes send several slices from one source: 300 bytes in three messages, two of them to the
    # other host.
    result = traffic("collective-permute", 300, gpus(2), pairs=[(0, 1), (0, 8), (0, 9), (3, 3)])
    assert result.tiers == {"nvlink": 100, "infiniband": 200}


def test_device_ids_decide_tiers():
    # Mesh positions 0 and 1 are devices 0 and 8: the next host.
    interleaved = [device for pair in zip(range(8), range(8, 16), strict=True) for device in pair]
    assert traffic("all-gather", 100, gpus(2), [(0, 1)]).tier == "nvlink"
    assert traffic("all-gather", 100, gpus(2), [(0, 1)], device_ids=interleaved).tier == "infiniband"


@pytest.mark.parametrize("groups", [[(0,), (1,)], [], [()]])
def test_nothing_moves(groups):
    result = traffic("all-reduce", 100, gpus(2), groups, wire=0)
    assert (result.tiers, result.tier, result.time_s, result.algorithm["name"]) == ({}, None, 0.0, "none")


def test_wire_bytes_without_groups_are_unknown_not_free():
    result = traffic("all-reduce", 100, gpus(2), [], wire=100)
    assert result.time_s is None


def test_unknown_bandwidth_gives_bytes_but_no_time():
    loopback = Domain(tier="loopback", size=8, bytes_per_s=None)
    machine = Machine(spec="cpu:8", chip=GPU, num_devices=8, domains=(loopback,), emulated=True)
    result = traffic("all-reduce", 800, machine, [range(8)])
    assert result.tiers == {"loopback": 1400}
    assert result.time_s is None


@pytest.mark.parametrize(
    ("groups", "device_ids"), [([(0, 16)], None), ([(0, 1)], [0, 99]), ([(0, 2)], [0, 1])]
)
def test_program_larger_than_the_machine(groups, device_ids):
    with pytest.raises(UserError, match="16 devices, but the program uses"):
        traffic("all-reduce", 100, gpus(2), groups, device_ids=device_ids)


# --- TPU torus: 16x16 with wraparound unless said; devices count with x fastest. Link 90 GB/s one way. ---

TORUS = tpus((16, 16), (True, True))
ROW, COLUMN = list(range(16)), list(range(0, 256, 16))


@pytest.mark.parametrize(
    ("machine", "groups", "links"),
    [
        pytest.param(TORUS, [ROW], 2, id="whole-ring-both-directions"),
        pytest.param(TORUS, [COLUMN], 2, id="ring-along-y"),
        pytest.param(TORUS, [range(256)], 4, id="two-rings-at-once"),
        pytest.param(TORUS, [range(8)], 1, id="half-a-ring-is-a-line"),
        pytest.param(TORUS, [(14, 15, 0, 1)], 1, id="line-over-the-edge"),
        pytest.param(
            TORUS, [range(0, 16, 2), range(1, 16, 2)], 1, id="two-interleaved-rings-share-the-links"
        ),
        pytest.param(TORUS, [(0, 1, 2, 3, 16, 17, 18, 19)], 2, id="4x2-block-is-two-lines-or-an-8-ring"),
        pytest.param(TORUS, [[*ROW, *range(16, 32)]], 3, id="ring-times-line"),
        pytest.param(tpus((8, 8), (False, False)), [range(8)], 1, id="no-wraparound"),
        pytest.param(TORUS, [(0, 1, 17)], 1, id="no-block-is-a-chain"),
    ],
)
def test_all_gather_on_a_torus(machine, groups, links):
    # Scaling book: V / (links · W), with the part (n-1)/n that really moves.
    V, n = 10**9, len(groups[0])
    result = traffic("all-gather", V, machine, groups)
    assert result.tiers == {"ici": Fraction(n - 1, n) * V}
    assert result.time_s == pytest.approx((n - 1) / n * V / (links * 90e9))


def test_member_order_does_not_matter_on_a_torus():
    shuffled = [5, 0, 9, 15, 1, 12, 2, 14, 3, 13, 4, 6, 11, 7, 10, 8]
    assert traffic("all-gather", 1600, TORUS, [shuffled]) == traffic("all-gather", 1600, TORUS, [ROW])


def test_make_mesh_order_is_read_from_coordinates():
    # An 8-way axis that the device order lays through a 4x2 block, along the ring 0 1 2 3 19 18 17 16.
    order = [0, 1, 2, 3, 19, 18, 17, 16]
    result = traffic("all-gather", 8 * 90 * 10**9, TORUS, [range(8)], device_ids=order)
    assert result.time_s == pytest.approx(7 / 2)  # 7 pieces of one second of a link, over two links


@pytest.mark.parametrize(
    ("machine", "group", "seconds_per_link_second"),
    [
        # Global bytes V = n · S; ring: V / (4 · 2 W) = n · S / 8W; a line's middle link carries S ·
        # (n/2)(n/2)/n.
        pytest.param(TORUS, ROW, 16 / 8, id="ring-of-16"),
        pytest.param(TORUS, range(8), 8 / 4, id="line-of-8"),
        pytest.param(TORUS, range(256), 16 / 8, id="16x16-torus"),
        pytest.param(TORUS, (0, 1), 1 / 2, id="pair"),
    ],
)
def test_all_to_all_on_a_torus_pays_for_its_hops(machine, group, seconds_per_link_second):
    S = 90 * 10**9
    assert traffic("all-to-all", S, machine, [group]).time_s == pytest.approx(seconds_per_link_second)


def test_scaling_book_all_to_all_is_a_quarter_of_all_gather():
    # The book's approximation drops (n-1)/n: 16/15 on a ring of 16. The same global array of V bytes.
    gather = traffic("all-gather", 16 * 10**9, TORUS, [ROW]).time_s
    exchange = traffic("all-to-all", 10**9, TORUS, [ROW]).time_s
    assert exchange == pytest.approx(gather / 4 * 16 / 15)


@pytest.mark.parametrize(
    ("pairs", "load"),
    [
        pytest.param([(i, (i + 1) % 16) for i in range(16)], 1, id="neighbours-round-the-ring"),
        pytest.param([(i, (i + 2) % 16) for i in range(16)], 2, id="two-hops-double-the-load"),
        pytest.param([(i, (i + 8) % 16) for i in range(16)], 4, id="half-way-goes-both-ways"),
        pytest.param([(0, 17)], 1, id="one-message-over-two-dimensions"),
        pytest.param([(0, 2), (1, 2)], 2, id="two-messages-on-one-link"),
    ],
)
def test_permutes_on_a_torus_share_links(pairs, load):
    result = traffic("collective-permute", 90 * 10**9, TORUS, pairs=pairs)
    assert result.time_s == pytest.approx(load)


def test_cores_of_one_chip_share_its_links():
    # 4x4x4 chips with two devices each: group of the first cores of a ring of 4, while the second cores run
    # theirs.
    chip = Chip(name="tpu7x", family="tpu", memory_bytes=None, xla_devices=2)
    machine = tpus((4, 4, 4), (True, True, True), chip=chip, link=100e9)
    V = 10**9
    alone = traffic("all-gather", V, machine, [range(0, 8, 2), range(1, 8, 2)])
    assert alone.time_s == pytest.approx(0.75 * V / (2 * 100e9 / 2))
    together = traffic("all-gather", V, machine, [range(8)])
    assert together.time_s == pytest.approx(7 / 8 * V / (2 * 100e9))
    same_chip = traffic("all-gather", V, machine, [(0, 1)])
    assert same_chip.time_s == pytest.approx(0.5 * V / 600e9)


def test_slices_over_dcn():
    # Two slices of 4x4; an all-reduce over everything, and a megascale all-reduce across slices only.
    machine = tpus((4, 4), (False, False), slices=2)
    S = 1 << 20
    result = traffic("all-reduce", S, machine, [range(32)])
    assert result.tiers == {"ici": 2 * Fraction(15, 16) * S, "dcn": 2 * Fraction(1, 2) * S / 16}
    across = traffic("all-reduce", S, machine, [(i, i + 16) for i in range(16)])
    assert across.tiers == {"dcn": S}
    assert across.time_s == pytest.approx(S / 6.25e9)


class Row:
    def __init__(self, executions, result, wire):
        self.executions, self.wire_bytes = executions, wire
        self.traffic, self.tier_s, self.time_s = result.tiers, result.tier_s, result.time_s


class Rows:
    def __init__(self, *collectives):
        self.collectives = collectives


def test_the_trap_of_bytes_over_the_slowest_tier():
    """llama3-70b, 64 H100s as 8 hosts of 8, batch 64 x 4096, bf16 collectives, full remat.

    Parameters: 80 · (8192·128·(64+2·8) + 64·128·8192 + 3·8192·28672 + 2·8192) + 2·128256·8192 + 8192 =
    70,553,706,496, so S = 141.1 GB in bf16. FSDP 64: gathers in forward and backward, one reduce-scatter: 3
    · 63/64 · S = 416.7 GB of wire bytes in groups that span InfiniBand. FSDP 8 x tensor 8: 3 · 7/8 · S/8 =
    46.3 GB of them, plus sequence-parallel gathers and scatters of 8·4096·8192·2 bytes (8 sequences a host)
    inside the host, 4 in each of forward, recompute, backward: 12 · 80 · 7/8 · 537 MB = 451 GB over NVLink.
    Read as bytes over the slowest tier, the second plan moves nine times less and wins. Per NIC both send
    the same 46.3 GB (0.926 s at 50 GB/s), since the 64-way group uses all eight NICs; NCCL's rings, which do
    not stay inside a host, take 63/64 in place of 7/8 of S/8: 1.042 s. The second adds 1.00 s of NVLink time.
    """
    machine = gpus(8)
    layer = 8192 * 128 * (64 + 2 * 8) + 64 * 128 * 8192 + 3 * 8192 * 28672 + 2 * 8192
    S = 2 * (80 * layer + 2 * 128256 * 8192 + 8192)
    assert S // 2 == 70_553_706_496

    everyone = [range(64)]
    across = [range(i, 64, 8) for i in range(8)]
    hosts = [range(host * 8, host * 8 + 8) for host in range(8)]

    wide = [traffic(kind, S, machine, everyone) for kind in ("all-gather", "all-gather", "reduce-scatter")]
    narrow = [
        traffic(kind, S // 8, machine, across) for kind in ("all-gather", "all-gather", "reduce-scatter")
    ]
    activations = traffic("all-gather", 8 * 4096 * 8192 * 2, machine, hosts)

    slowest_wide = 3 * Fraction(63, 64) * S
    slowest_narrow = sum(row.tiers["infiniband"] for row in narrow)
    assert float(slowest_wide) == pytest.approx(416.7e9, rel=1e-3)
    assert float(slowest_narrow) == pytest.approx(46.3e9, rel=1e-3)
    assert slowest_wide == 9 * slowest_narrow  # the misleading order: 63/64 against 7/64

    assert sum(row.tiers["infiniband"] for row in wide) == slowest_narrow  # per NIC they are equal

    fsdp = communication(Rows(*(Row((1, 1), row, Fraction(1)) for row in wide)), machine)
    mixed_rows = [
        *(Row((1, 1), row, Fraction(1)) for row in narrow),
        Row((960, 960), activations, Fraction(1)),
    ]
    mixed = communication(Rows(*mixed_rows), machine)
    assert fsdp.communication_s == pytest.approx(1.042, rel=1e-3)
    assert mixed.tier_s == pytest.approx({"infiniband": 0.926, "nvlink": 1.002}, rel=1e-3)
    assert mixed.communication_s == pytest.approx(1.928, rel=1e-3)
    assert (fsdp.dominant, mixed.dominant) == ("infiniband", "nvlink")


@pytest.mark.parametrize(
    ("machine", "groups"),
    [
        pytest.param(gpus(2048), [range(16_384)], id="one-group-of-16384"),
        pytest.param(gpus(2048), [range(i, 16_384, 8) for i in range(8)], id="8-groups-of-2048"),
        pytest.param(gpus(2048), [(i, i + 1) for i in range(0, 16_384, 2)], id="8192-pairs"),
        pytest.param(
            tpus((16, 20, 28), (True,) * 3), [range(i, i + 16) for i in range(0, 8960, 16)], id="v5p-pod"
        ),
    ],
)
def test_large_machines_are_fast(machine, groups):
    groups = tuple(tuple(group) for group in groups)
    start = time.process_time()
    traffic("all-gather", 1 << 30, machine, groups)
    assert time.process_time() - start < 2.0
    start = time.process_time()
    for _ in range(20):
        traffic("all-reduce", 1 << 30, machine, groups)
    assert time.process_time() - start < 1.0
