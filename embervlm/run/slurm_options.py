"""The options that `sbatch` got for a job, so that a job submitted instead of it gets the same ones."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

from embervlm.config import REPOSITORY
from embervlm.slurm_commands import SlurmError, ask, fields

OPTIONS = {
    "Partition": "partition",
    "Account": "account",
    "QOS": "qos",
    "Reservation": "reservation",
    "WCKey": "wckey",
    "TimeLimit": "time",
    "TimeMin": "time-min",
    "Deadline": "deadline",
    "MinMemoryNode": "mem",
    "MinMemoryCPU": "mem-per-cpu",
    "MinTmpDiskNode": "tmp",
    "Switches": "switches",
    "Features": "constraint",
    "ExcNodeList": "exclude",
    "ReqNodeList": "nodelist",
    "Licenses": "licenses",
    "Network": "network",
    "Comment": "comment",
    "MailType": "mail-type",
    "MailUser": "mail-user",
    "Nice": "nice",
    "JobName": "job-name",
}
"""Field of `scontrol show job` -> option of sbatch."""
NOTHING = {"", "(null)", "N/A", "NONE", "0", "*"}
_UNITS = {"": 1, "M": 1, "G": 1024, "T": 1024**2}


def given(job: str, script: str) -> list[str]:
    """The options that `sbatch` got for `job` besides nodes and GPUs, as far as Slurm shows them.

    Options that repeat a default are left out: the default partition, its time limit, the user's account.

    Args:
        script: The script of the job; its `#SBATCH` lines are not the user's.
    """
    has = fields("job", job)
    without = _defaults(has, script)
    out = [
        f"--{option}={has[field]}"
        for field, option in OPTIONS.items()
        if has.get(field, "") not in NOTHING and has[field] != without.get(field)
    ]
    if per_gpu := re.search(r"gpu:(\d+)", has.get("MemPerTres", "")):
        out.append(f"--mem-per-gpu={per_gpu[1]}")
    if cpus := os.environ.get("SLURM_CPUS_PER_TASK"):
        out.append(f"--cpus-per-task={cpus}")
    if has.get("OverSubscribe") == "NO":
        out.append("--exclusive")
    if has.get("Requeue") == "0":
        out.append("--no-requeue")
    if has["StdOut"] != f"{has['WorkDir']}/{has['JobName']}-{job}.log":
        out.append(f"--output={_pattern(has['StdOut'], job)}")
    if has["StdErr"] != has["StdOut"]:
        out.append(f"--error={_pattern(has['StdErr'], job)}")
    return out


def _defaults(has: dict[str, str], script: str) -> dict[str, str]:
    """Field -> the value of a job of this script without options of `sbatch`."""
    partition = fields("partition", has["Partition"])
    own = re.search(r"^#SBATCH --job-name=(\S+)", (REPOSITORY / script).read_text(encoding="utf-8"), re.MULTILINE)
    out = {"JobName": own[1] if own else "", "TimeLimit": partition["DefaultTime"]}
    if partition["DefaultTime"] == "NONE":
        out["TimeLimit"] = partition["MaxTime"]
    if partition["Default"] == "YES":
        out["Partition"] = has["Partition"]
    for field, default in (("MinMemoryNode", "DefMemPerNode"), ("MinMemoryCPU", "DefMemPerCPU")):
        if field in has and _megabytes(has[field]) in (_megabytes(partition.get(default, "")), _of_cluster(default)):
            out[field] = has[field]
    if has.get("Account", "") not in NOTHING:
        with contextlib.suppress(SlurmError, KeyError, ValueError):  # unknown: carried
            asked = ("sacctmgr", "-nP", "show", "user", os.environ["USER"], "withassoc")
            for row in ask(*asked, "format=DefaultAccount,Account,DefaultQOS").splitlines():
                out["Account"], account, qos = row.split("|")
                if account == has["Account"]:
                    out["QOS"] = qos or "normal"
    return out


def _of_cluster(name: str) -> float | None:
    found = re.search(rf"^{name}\s*=\s*(\S+)", ask("scontrol", "show", "config"), re.MULTILINE)
    return _megabytes(found[1]) if found else None


def _megabytes(text: str) -> float | None:
    found = re.fullmatch(r"([\d.]+)([MGT]?)", text)
    return float(found[1]) * _UNITS[found[2]] if found else None


def _pattern(path: str, job: str) -> str:
    """Slurm shows a log's path with the job's number; the other job has another."""
    name = re.sub(rf"(?<!\d){job}(?!\d)", "%j", Path(path).name)
    return str(Path(path).with_name(name))
