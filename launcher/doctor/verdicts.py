"""Pure: what a report means. Each check becomes one finding: how it stands, what was seen, what to do."""

from __future__ import annotations

import statistics
import textwrap
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from launcher.doctor.examination import Machine, Place, Report

__all__ = ["Finding", "judge", "names", "table"]

_GIB = 1 << 30
_CLOCK_BAD_S = 1.0
_CLOCK_POOR_S = 0.1
# A path of a Unix socket holds 107 bytes; torch's loader workers append about 30 to this one, and with it too long
# batches are lost with "AF_UNIX path too long" (torch 2.15).
_TMP_LONGEST = 75
_SHM_LEAST = _GIB  # docker gives 64 MiB
_FILES_LEAST = 4096
_HOT_C = 90
_SLOW = 0.33  # of the median of all pairs
_BRAKES = {0x08: "hardware slowdown", 0x20: "heat", 0x40: "heat (hardware)", 0x80: "power brake"}


@dataclass(frozen=True)
class Finding:
    """status: "ok", "poor" (worth knowing, no reason to stop), "bad", or "none" (there is nothing to look at)."""

    check: str
    status: Literal["ok", "poor", "bad", "none"]
    found: str
    fix: str = ""

    def to_json(self) -> dict[str, str]:
        return asdict(self)


def judge(report: Report, place: Place) -> list[Finding]:
    """All findings on the machines, in the order of a person's questions."""
    here = [m for m in report.machines if m.facts is not None]
    findings = [_machines(report)]
    findings += [_interpreter(here, report), _packages(here, report, place)]
    findings += [_folder(here, place), _clocks(here), _shm(here), _files(here), _temporary(here)]
    findings += [_gpus(here, place), *_locked(here)]
    if len(report.machines) > 1:
        findings += [_ports(here, report, place), _bandwidth(here, report)]
    elif place.port:
        findings.append(_own_port(here, place))
    return [*findings, _reduced(report)]


def names(found: Iterable[str], most: int = 8) -> str:
    """Some of many names."""
    listed = list(found)
    return ", ".join(listed[:most]) + (f" and {len(listed) - most} more" if len(listed) > most else "")


def _machines(report: Report) -> Finding:
    gone = [m for m in report.machines if m.gone is not None]
    if not gone:
        return Finding("machines", "ok", names((m.facts or {}).get("host", m.name) for m in report.machines))
    told = "; ".join(f"{m.name}: {m.gone}" for m in gone[:8]) + (f"; and {len(gone) - 8} more" if len(gone) > 8 else "")
    fix = "see that each can be logged in to, and that this environment is installed at the same path there"
    return Finding("machines", "bad", f"{len(gone)} of {len(report.machines)} could not be examined: {told}", fix)


def _differing(values: Mapping[str, str]) -> str:
    """`3.11.2`, or who differs from most: `3.11.2; bob: 3.10.1`."""
    by_value: dict[str, list[str]] = {}
    for name, value in values.items():
        by_value.setdefault(value, []).append(name)
    ordered = sorted(by_value.items(), key=lambda item: -len(item[1]))
    return "; ".join([ordered[0][0] if ordered else "", *(f"{names(who)}: {value}" for value, who in ordered[1:])])


def _with_here(here: Sequence[Machine], report: Report, tell: Callable[[dict[str, Any]], str]) -> dict[str, str]:
    told = {m.name: tell(m.facts or {}) for m in here}
    # Where launch is called counts too: functions and results travel between it and the ranks.
    return told | {f"{report.here['host']} (here)": tell(report.here)}


def _interpreter(here: Sequence[Machine], report: Report) -> Finding:
    told = _with_here(here, report, lambda f: f"Python {f['python']} ({f['machine']}) {f['executable']}")
    if len(set(told.values())) == 1:
        return Finding("interpreter", "ok", _differing(told))
    return Finding("interpreter", "bad", _differing(told), "install the same Python at the same path on all")


def _packages(here: Sequence[Machine], report: Report, place: Place) -> Finding:
    same: list[str] = []
    bad: list[str] = []
    for name in report.here["packages"]:
        told = _with_here(here, report, lambda f, name=name: f["packages"][name] or "absent")  # type: ignore[misc]
        if set(told.values()) == {"absent"}:
            if place.packages.get(name, True):
                bad.append(f"{name} is absent")
        else:
            (same if len(set(told.values())) == 1 else bad).append(f"{name} {_differing(told)}")
    if bad:
        return Finding("packages", "bad", "; ".join(bad), "install the same versions on all: pip install -r or -e .")
    return Finding("packages", "ok", names(same))


def _folder(here: Sequence[Machine], place: Place) -> Finding:
    folder = place.folder
    if folder is None:
        return Finding("shared folder", "none", "none is needed: the code is copied, the logs are brought back")
    failed = {m.name: m.written["error"] for m in here if m.written is not None and m.written["error"]}
    if failed:
        told = "; ".join(f"{name}: {why}" for name, why in list(failed.items())[:8])
        fix = "give a run folder (--run DIR) on storage that all machines write to, or use --hosts with --sync"
        return Finding("shared folder", "bad", f"{folder} cannot be written: {told}", fix)
    unread = {m.name: m.read["error"] for m in here if m.read is not None and m.read["error"]}
    if unread:
        told = f"{folder}: what one machine wrote another does not see ({names(unread)})"
        fix = "put the run folder (--run DIR) on storage that all share, or use --hosts with --sync"
        return Finding("shared folder", "bad", told, fix)
    slowest = max((m.read["seconds"] for m in here if m.read is not None), default=0.0)
    if slowest > 1.0:
        told = f"{folder}: a file of one machine is seen by another after {slowest:.1f} s"
        return Finding("shared folder", "poor", told, "mount it with a shorter cache of attributes (acdirmax=1)")
    return Finding("shared folder", "ok", f"{folder}: written, locked and read" + (" by all" if len(here) > 1 else ""))


def _clocks(here: Sequence[Machine]) -> Finding:
    off = {m.name: m.clock_s for m in here if m.clock_s is not None}
    # What may be half the way there and back is no difference.
    sure = {name: (ahead, wrong) for name, (ahead, wrong) in off.items() if abs(ahead) - wrong > _CLOCK_POOR_S}
    if not sure:
        most = max((abs(ahead) for ahead, _ in off.values()), default=0.0)
        return Finding("clocks", "ok", f"within {max(most, 0.001) * 1000:.0f} ms of this machine's")
    told = "; ".join(
        f"{name} is {abs(ahead):.3f} s {'ahead of' if ahead > 0 else 'behind'} this machine (+- {wrong * 1000:.1f} ms)"
        for name, (ahead, wrong) in list(sure.items())[:8]
    )
    bad = any(abs(ahead) - wrong > _CLOCK_BAD_S for ahead, wrong in sure.values())
    return Finding(
        "clocks", "bad" if bad else "poor", told, "start a time service there: systemctl enable --now chrony"
    )


def _size(count: float) -> str:
    return f"{count / _GIB:.1f} GiB" if count >= _GIB else f"{count / (1 << 20):.0f} MiB"


def _shm(here: Sequence[Machine]) -> Finding:
    spaces = {m.name: (m.facts or {})["shm"] for m in here}
    small = {n: s for n, s in spaces.items() if s is None or s["free"] < _SHM_LEAST}
    if small:
        told = "; ".join(f"{n}: " + ("absent" if s is None else f"{_size(s['free'])} of {_size(s['total'])} free")
                         for n, s in list(small.items())[:8])  # fmt: skip
        fix = (
            "remove what is left in /dev/shm, or make it larger: mount -o remount,size=50% /dev/shm; docker --shm-size"
        )
        return Finding("/dev/shm", "bad", told, fix)
    least = min((s["free"] for s in spaces.values()), default=0)
    return Finding("/dev/shm", "ok", f"{_size(least)} free" + (" or more" if len(here) > 1 else ""))


def _files(here: Sequence[Machine]) -> Finding:
    told = {m.name: f"{(m.facts or {})['files']['soft']} (up to {(m.facts or {})['files']['hard']})" for m in here}
    few = [m.name for m in here if (m.facts or {})["files"]["hard"] < _FILES_LEAST]
    if few:
        fix = f"raise nofile to {_FILES_LEAST} or more: ulimit -n, /etc/security/limits.conf, LimitNOFILE of slurmd"
        return Finding("open files", "bad", _differing(told), fix)
    return Finding("open files", "ok", _differing(told))


def _temporary(here: Sequence[Machine]) -> Finding:
    paths = {m.name: str((m.facts or {})["tmp"]["path"]) for m in here}
    long = [name for name, path in paths.items() if len(path) > _TMP_LONGEST]
    if long:
        told = f"{names(long)}: {paths[long[0]]} has {len(paths[long[0]])} characters: the sockets that torch's loader"
        return Finding(
            "TMPDIR",
            "bad",
            f"{told} workers make there have no room for their names",
            "export TMPDIR=/tmp (--env TMPDIR=/tmp)",
        )
    full = [m.name for m in here if (m.facts or {})["tmp"].get("free", 0) < _GIB // 4]
    if full:
        return Finding("TMPDIR", "poor", f"less than 256 MiB are free there: {names(full)}", "clean it up")
    return Finding("TMPDIR", "ok", _differing(paths))


def _gpus(here: Sequence[Machine], place: Place) -> Finding:
    listed = {m.name: (m.facts or {})["gpus"] for m in here}
    dumb = {name: gpus for name, gpus in listed.items() if isinstance(gpus, str)}
    if dumb:
        told = "; ".join(f"{name}: {why}" for name, why in list(dumb.items())[:8])
        return Finding(
            "GPUs", "bad", told, "the driver does not answer: see dmesg there; drain the machine or reboot it"
        )
    wanted = place.gpus or 0
    if not any(listed.values()):
        if wanted:
            return Finding("GPUs", "bad", f"none, where {wanted} are asked for", "ask for machines that have GPUs")
        return Finding("GPUs", "none", "none")
    kinds = {name: _kind(gpus or []) for name, gpus in listed.items()}
    few = [m.name for m in here if (m.facts or {})["visible"] < wanted]
    ill = [
        f"{name} GPU {gpu['index']}: {why}" for name, gpus in listed.items() for gpu in gpus or [] for why in _ills(gpu)
    ]
    if few:
        told = f"{names(few)}: fewer than the {wanted} asked for ({_differing(kinds)})"
        return Finding("GPUs", "bad", told, "leave these machines out, or ask for fewer GPUs")
    if ill:
        fix = "leave the machine out until it was reset (nvidia-smi -r; -c DEFAULT for the mode), cooled, or repaired"
        return Finding("GPUs", "bad", names(ill), fix)
    if len(set(kinds.values())) > 1:
        return Finding(
            "GPUs",
            "bad",
            _differing(kinds),
            "take machines of one kind, with the same driver: all wait for the slowest",
        )
    cut = [f"{name} GPU {gpu['index']}" for name, gpus in listed.items() for gpu in gpus or [] if gpu["mig"]]
    if cut:
        fix = (
            "take whole GPUs (nvidia-smi -mig 0, as root): a process sees one instance, and NCCL does not join several"
        )
        return Finding("GPUs", "poor", f"cut into MIG instances: {names(cut)}", fix)
    busy = [
        f"{name} GPU {gpu['index']} ({gpu['used'] / 1024:.1f} of {gpu['memory'] / 1024:.1f} GiB)"
        for name, gpus in listed.items() for gpu in gpus or [] if (gpu["used"] or 0) > (gpu["memory"] or 0) * 0.1
    ]  # fmt: skip
    if busy:
        fix = "see whose it is: nvidia-smi --query-compute-apps=gpu_uuid,pid,process_name,used_memory --format=csv"
        return Finding("GPUs", "poor", f"memory in use already: {names(busy)}", fix)
    return Finding("GPUs", "ok", _differing(kinds))


def _kind(gpus: Sequence[Mapping[str, Any]]) -> str:
    if not gpus:
        return "none"
    return f"{len(gpus)} x {gpus[0]['name']}, driver {gpus[0]['driver']}"


def _ills(gpu: Mapping[str, Any]) -> list[str]:
    found = []
    if gpu["ecc"]:
        found.append(f"{gpu['ecc']} uncorrected memory error{'s' if gpu['ecc'] > 1 else ''}")
    braked = [why for bit, why in _BRAKES.items() if (gpu["throttle"] or 0) & bit]
    if braked:
        found.append(f"slowed down by {', '.join(braked)}")
    if (gpu["temperature"] or 0) >= _HOT_C:
        found.append(f"{gpu['temperature']} degrees Celsius")
    if gpu["mode"] == "Prohibited":
        found.append("compute mode Prohibited: no program may use it")
    return found


def _locked(here: Sequence[Machine]) -> list[Finding]:
    """Memory that RDMA may hold, where there is RDMA."""
    able = [m for m in here if (m.facts or {})["rdma"]]
    if not able:
        return []
    short = [m.name for m in able if (m.facts or {})["locked"] is not None]
    if short:
        fix = "ulimit -l unlimited: /etc/security/limits.conf, LimitMEMLOCK of slurmd"
        return [Finding("locked memory", "bad", f"limited where there is RDMA: {names(short)}", fix)]
    return [Finding("locked memory", "ok", "unlimited")]


def _own_port(here: Sequence[Machine], place: Place) -> Finding:
    held = [(m.facts or {})["opened"].get("error") for m in here if (m.facts or {})["opened"]["port"] is None]
    if held:
        return Finding(
            "ports", "bad", str(held[0]), f"see who holds it: ss -ltnp 'sport = :{place.port}'; or leave it out"
        )
    return Finding("ports", "ok", f"{place.port} is free")


def _ports(here: Sequence[Machine], report: Report, place: Place) -> Finding:
    if place.port and (own := _own_port(here, place)).status == "bad":
        return own
    cut = [(m.name, report.machines[other].name, why) for m in here for other, why in m.unreached.items()]
    count = len(here) * (len(here) - 1)
    if cut:
        told = "; ".join(f"{one} does not reach {other} ({why})" for one, other, why in cut[:4])
        more = f"; and {len(cut) - 4} more of {count} pairs" if len(cut) > 4 else ""
        fix = "open all ports between the machines (ranks listen on free ones); --local-addr names another address"
        return Finding("ports", "bad", told + more, fix)
    which = f"port {place.port}" if place.port else "a free port"
    return Finding("ports", "ok", f"each reaches each on {which}: {count} pairs")


def _bandwidth(here: Sequence[Machine], report: Report) -> Finding:
    if not report.rates:
        return Finding("bandwidth", "none", "not measured: fewer than two machines reach each other")
    usual = statistics.median(report.rates.values())
    slow = {pair: rate for pair, rate in report.rates.items() if rate < _SLOW * usual}
    pairs = f"{len(report.rates)} of {len(here) * (len(here) - 1)} pairs"
    if slow:
        worst = sorted(slow.items(), key=lambda item: item[1])
        told = "; ".join(
            f"{report.machines[a].name} to {report.machines[b].name}: {_rate(rate)}" for (a, b), rate in worst[:4]
        )
        more = f"; and {len(slow) - 4} more" if len(slow) > 4 else ""
        fix = "see the link's speed and errors there (ethtool, ip -s link); leave the machine out until it is mended"
        return Finding("bandwidth", "bad", f"{told}{more}, where the median is {_rate(usual)} ({pairs})", fix)
    least = min(report.rates.values())
    return Finding("bandwidth", "ok", f"median {_rate(usual)}, least {_rate(least)} ({pairs}, TCP, one stream)")


def _rate(rate: float) -> str:
    return f"{rate / 1e9:.2f} GB/s" if rate >= 1e9 else f"{rate / 1e6:.1f} MB/s"


def _reduced(report: Report) -> Finding:
    reduced = report.reduced or {"skipped": "no machine was there for it"}
    if "skipped" in reduced:
        return Finding("all-reduce", "none", f"not tried: {reduced['skipped']}")
    kind = f"{reduced['backend']}, {reduced['size']} rank{'s' if reduced['size'] > 1 else ''}"
    if reduced["failed"]:
        told = "; ".join(f"{report.machines[n].name}: {why}" for n, why in list(reduced["failed"].items())[:4])
        what = "NCCL_DEBUG=INFO" if reduced["backend"] == "nccl" else "GLOO_SOCKET_IFNAME=<interface>"
        return Finding("all-reduce", "bad", f"{kind}: {told}", f"try again with {what} in the environment")
    told = f"{kind}: {reduced['latency_s'] * 1e3:.2f} ms for one number"
    if reduced["size"] > 1:
        told += f", {_rate(reduced['rate'])} over each link for {_size(reduced['bytes'])}"
    return Finding("all-reduce", "ok", told)


def table(findings: Sequence[Finding], columns: int | None) -> list[str]:
    """The findings as lines: how it stands, what was looked at, what was seen, and below what to do."""
    wide = max(len(f.check) for f in findings)
    words = {"ok": "ok", "poor": "poor", "bad": "BAD", "none": "-"}
    lines = []
    for finding in findings:
        head = f"{words[finding.status]:<5}{finding.check:<{wide}}  "
        fix = f"-> {finding.fix}" if finding.fix and finding.status != "ok" else ""
        for start, text in ((head, finding.found), (" " * len(head), fix)):
            if text:
                lines += textwrap.wrap(
                    text, columns or 10_000, initial_indent=start, subsequent_indent=" " * len(head),
                    break_long_words=False, break_on_hyphens=False,
                )  # fmt: skip
    return lines
