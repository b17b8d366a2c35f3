"""Every message was printed by jax 0.10.2 or 0.12.0 (and its libtpu), or is quoted from an XLA issue."""

# ruff: noqa: E501 (log lines are as long as they are)

import pytest

from shardlab.compile.logs import last_words, refusal, rejected_flags, warnings

GIB = 1 << 30


@pytest.mark.parametrize(
    ("log", "expected"),
    [
        pytest.param(
            "F1123 00:12:31.957163 7114 parse_flags_from_env.cc:234] Unknown flag in XLA_FLAGS: --xla_gpu_nope=1",
            (("xla_gpu_nope", "unknown to this XLA"),),
            id="XLA, one",
        ),
        pytest.param(
            "F1123 00:12:30.886438 7053 parse_flags_from_env.cc:234] Unknown flags in XLA_FLAGS: --xla_nope=1 --xla_b",
            (("xla_nope", "unknown to this XLA"), ("xla_b", "unknown to this XLA")),
            id="XLA, several",
        ),
        pytest.param(
            "ERROR: Unknown command line flag 'xla_tpu_nope'\nERROR: Unknown command line flag 'xla_gpu_a'. "
            "Did you mean: xla_tpu_a ?\n",
            (("xla_tpu_nope", "unknown to this libtpu"), ("xla_gpu_a", "unknown to this libtpu")),
            id="libtpu, several",
        ),
        pytest.param(
            "E1123 00:12:54.468563 7252 command_line_flags.cc:93] Couldn't interpret value banana for flag "
            "xla_cpu_enable_fast_math.\nF1123 00:12:54.4 7252 parse_flags_from_env.cc:220] Check failed: …",
            (("xla_cpu_enable_fast_math", "'banana' is not a value for it"),),
            id="XLA, bad value",
        ),
        pytest.param(
            "ERROR: Illegal value 'banana' specified for flag 'xla_tpu_enable_async_collective_fusion'",
            (("xla_tpu_enable_async_collective_fusion", "'banana' is not a value for it"),),
            id="libtpu, bad value",
        ),
        pytest.param("W1123 all is well\n", (), id="none"),
    ],
)
def test_rejected_flags(log: str, expected: tuple[tuple[str, str], ...]) -> None:
    assert rejected_flags(log) == expected


# Bytes by hand: 15.75 GiB is 15.75 * 2^30; 33.09 GiB = 35 433 480 192 + 96 636 764.16, rounded to whole bytes.
@pytest.mark.parametrize(
    ("message", "needed_bytes", "limit_bytes"),
    [
        pytest.param(
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (40.00G) "
            "exceeds available HBM (15.75G).",
            40 * GIB,
            16_911_433_728,
            id="jax 0.10.2",
        ),
        pytest.param(
            "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for "
            "HLO temporaries (40.00G) exceeds available HBM (15.75G). HLO module: jit_f.\nSee https://openxla.org",
            40 * GIB,
            16_911_433_728,
            id="jax 0.12",
        ),
        pytest.param(
            "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom:\nXLA:TPU compile permanent error. Ran out of memory in "
            "memory space hbm. Used 33.09G of 15.75G hbm. Exceeded hbm capacity by 17.34G.\n\nTotal hbm usage >= …",
            35_530_116_956,
            16_911_433_728,
            id="used of",
        ),
        pytest.param("Used 1.5T of 900.00M hbm.", 3 * (1 << 39), 900 << 20, id="other units"),
    ],
)
def test_refusal(message: str, needed_bytes: int, limit_bytes: int) -> None:
    refused = refusal(message)
    assert refused is not None
    assert (refused.needed_bytes, refused.limit_bytes) == (needed_bytes, limit_bytes)
    assert refused.largest_batch is None
    assert "\n" not in refused.text
    assert refused.text in message


@pytest.mark.parametrize(
    "message",
    [
        pytest.param("INTERNAL: Mosaic failed to compile TPU kernel", id="another error"),
        pytest.param(
            "Ran out of memory in memory space vmem. Used 20.1M of 16.00M vmem.", id="not device memory"
        ),
        pytest.param("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 8 bytes.", id="at run time"),
    ],
)
def test_not_a_refusal(message: str) -> None:
    assert refusal(message) is None


SHARDY = (
    "W1123 00:13:56.103191    7972 spmd_partitioner.cc:666] [SPMD] Involuntary full rematerialization. The compiler "
    "cannot go from sharding {mesh['x'=4,'y'=2], [{'y'}, {}, {'x'}]} to {mesh['x'=4,'y'=2], [{}, {'x', 'y'}, {}]} "
    "efficiently for HLO operation %add.0 = f32[8,16,4]{2,1,0} add(%param, %param), sharding={mesh['x'=4,'y'=2], "
    "[{'y'}, {}, {'x'}]}, metadata={op_name=\"jit(f)/add\" stack_frame_id=2}. As the last resort, SPMD will …"
)
TILED = (
    "W1123 00:14:29.419000    8348 spmd_partitioner.cc:654] [SPMD] Involuntary full rematerialization. The compiler "
    "cannot go from sharding {devices=[2,1,4]<=[4,2]T(1,0)} to {devices=[1,8,1]<=[8]} efficiently for HLO operation "
    "%add.2 = f32[8,16,4]{2,1,0} add(%param, %param), sharding={devices=[2,1,4]<=[4,2]T(1,0)}. As the last resort …"
)
OLD = (
    "2025-04-14 17:55:24.092274: E external/xla/xla/service/spmd/spmd_partitioner.cc:621] [spmd] Involuntary full "
    "rematerialization. The compiler was not able to go from sharding {devices=[2,2]<=[4]} to {devices=[4,1]<=[4]} "
    "without doing a full rematerialization of the tensor for HLO operation: %pad = f64[96]{0} pad(%b, %c)."
)


@pytest.mark.parametrize(
    ("line", "names"),
    [
        pytest.param(
            SHARDY,
            (
                "add.0",
                "jit(f)/add",
                "{mesh['x'=4,'y'=2], [{'y'}, {}, {'x'}]}",
                "{mesh['x'=4,'y'=2], [{}, {'x', 'y'}, {}]}",
            ),
            id="jax 0.12",
        ),
        pytest.param(
            TILED,
            ("add.2", "{devices=[2,1,4]<=[4,2]T(1,0)}", "{devices=[1,8,1]<=[8]}"),
            id="jax 0.10, libtpu",
        ),
        pytest.param(OLD, ("pad", "{devices=[2,2]<=[4]}", "{devices=[4,1]<=[4]}"), id="2025"),
    ],
)
def test_rematerialization_names_instruction_and_shardings(line: str, names: tuple[str, ...]) -> None:
    (warning,) = warnings(f"noise\n{line}\nmore noise\n")
    assert warning.kind == "involuntary full rematerialization"
    assert warning.names == names


def test_warnings_appear_once_each_in_order() -> None:
    donated = "UserWarning: Some donated buffers were not usable: float32[8]."
    again = SHARDY.replace("00:13:56", "00:14:57").replace("7972", "7973")
    assert [w.kind for w in warnings("\n".join([SHARDY, donated, again, TILED]))] == [
        "involuntary full rematerialization",
        "donated buffers not used",
        "involuntary full rematerialization",
    ]


@pytest.mark.parametrize(
    ("log", "expected"),
    [
        pytest.param("E1123 00:12:54.4 7252 a.cc:9] bad\nF1123 00:12:54.5 7252 b.cc:1] Check failed: x\n  @ 0x1\n",
                     "b.cc:1] Check failed: x", id="fatal check"),
        pytest.param('Traceback …\n  File "x.py"\njax.errors.JaxRuntimeError: INTERNAL: boom\nsee docs\n',
                     "jax.errors.JaxRuntimeError: INTERNAL: boom", id="exception"),
        pytest.param("something\nlast\n\n", "last", id="last line"),
        pytest.param("", "it printed nothing", id="silence"),
    ],
)  # fmt: skip
def test_last_words(log: str, expected: str) -> None:
    assert last_words(log) == expected
