"""Pure: what Slurm's settings mean for a job, in words: when it is preempted, how much time it gets, how it goes on."""

from __future__ import annotations

import re

from launcher.backends import slurm_notation as notation
from launcher.backends.slurm_stop import kill_wait_of_config
from launcher.doctor.verdicts import Finding
from launcher.errors import ClusterError

__all__ = ["settings"]

_SAVE_OFTEN = "save often (trainer: save_every=...): what was trained since the newest checkpoint is lost"


def settings(config: str, partitions: str, name: str | None) -> list[Finding]:
    """Findings on a partition (None: the default one), of what `scontrol show config` and `scontrol show partition`
    printed. Raises `ClusterError` if there is no such partition, or the answers have another form.
    """
    table = {}
    for block in re.split(r"\n\s*\n", partitions.strip()):
        values = dict(re.findall(r"([A-Za-z]\w*)=(\S*)", block))
        table[values.get("PartitionName", "")] = values
    if name is None:
        name = next((n for n, values in table.items() if values.get("Default") == "YES"), None)
    if name is None or name not in table:
        wanted = "default partition" if name is None else f"partition {name!r}"
        raise ClusterError(f"Slurm has no {wanted}; it has {', '.join(sorted(table)) or 'none'}")
    return [_state(name, table[name]), _preemption(config, table, name), _limits(config, name, table[name])]


def _setting(config: str, name: str) -> str:
    match = re.search(rf"^{name}\s*=\s*(\S.*?)\s*$", config, re.MULTILINE)
    return match[1] if match is not None else ""


def _state(name: str, partition: dict[str, str]) -> Finding:
    state = partition.get("State", "UP")
    told = f"{name}: {partition.get('TotalNodes', '?')} nodes, {state}"
    if state == "UP":
        return Finding("partition", "ok", told)
    return Finding("partition", "bad", told, "jobs there do not start: choose another one (sinfo lists them)")


def _preemption(config: str, table: dict[str, dict[str, str]], name: str) -> Finding:
    partition = table[name]
    kind = _setting(config, "PreemptType")
    modes = (partition.get("PreemptMode") or _setting(config, "PreemptMode")).upper().split(",")
    mode = next((m for m in modes if m != "GANG"), "OFF")
    if kind in ("preempt/none", "") or mode in ("OFF", "DISABLED"):
        return Finding("preemption", "ok", f"{name}: jobs are not preempted")
    who = "a job of a QOS that may preempt yours"
    if kind == "preempt/partition_prio":
        tier = int(partition.get("PriorityTier", "1"))
        above = [other for other, values in table.items() if int(values.get("PriorityTier", "1")) > tier]
        if not above:
            return Finding("preemption", "ok", f"{name}: jobs are not preempted: no partition stands above it")
        who = f"a job in {', '.join(sorted(above))}"
    grace_s = int(partition.get("GraceTime", "0"))
    told = f"{name}: {who} may preempt it"
    exempt = _setting(config, "PreemptExemptTime")
    if exempt not in ("", "00:00:00") and notation.duration(exempt):
        told += f" once it has run for {exempt}"
    if mode == "SUSPEND":
        fix = "GPU memory stays taken and peers on the network time out: ask the cluster's operators for REQUEUE"
        return Finding("preemption", "poor", f"{told}: it is stopped where it is (SIGSTOP), and goes on later", fix)
    notice = f"SIGTERM, then {grace_s} s to save" if grace_s else "no time to save beyond KillWait"
    if mode == "CANCEL":
        fix = "--requeue resubmit submits a new job that goes on; Slurm does not put a cancelled one back"
        return Finding("preemption", "poor", f"{told}: {notice}; it is cancelled", fix)
    told += f": {notice}; it goes back into the queue and on from there"
    if not grace_s:
        return Finding("preemption", "poor", told, _SAVE_OFTEN)
    return Finding("preemption", "ok", told)


def _limits(config: str, name: str, partition: dict[str, str]) -> Finding:
    try:
        longest = notation.duration(partition.get("MaxTime", ""))
        usual = notation.duration(partition.get("DefaultTime", "").replace("NONE", ""))
    except ValueError as error:
        raise ClusterError(f"scontrol show partition {name}: {error}") from error
    kill_s = kill_wait_of_config(config)
    limit = "no time limit" if longest is None else f"at most {notation.format_duration(longest)} (days-h:m:s)"
    told = f"{name}: {limit}"
    if usual is not None and usual != longest:
        told += f", {notation.format_duration(usual)} if --time does not say"
    told += f"; from Slurm's own SIGTERM to SIGKILL {kill_s:.0f} s (KillWait)"
    if _setting(config, "JobRequeue") == "0":
        told += "; jobs are not requeued by default (launch asks for it itself)"
    if longest is not None:
        told += "; launch has the ranks save before the limit, and requeues"
    return Finding("time limits", "ok", told)
