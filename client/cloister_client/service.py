"""A systemd unit for the agent: what it needs and nothing else, for an account without rights or for the system."""

from __future__ import annotations

import sys
from pathlib import Path

from cloister_client.decisions import account

_UNIT = """\
# The Cloister agent of {site}. {where}
# Without a line below the agent works as well, and is less confined.
[Unit]
Description=Cloister agent of {site}
Wants=network-online.target
After=network-online.target
StartLimitIntervalSec=0

[Service]
Type=exec
{account}ExecStart={python} -m cloister_client.cli start --site {site_yaml}
WorkingDirectory={where_it_works}
Environment=FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1 PYTHONUNBUFFERED=1
UMask=0077
# 1 is a refusal, such as a hospital that is not enrolled: to try again would not help.
Restart=on-failure
RestartPreventExitStatus=1
RestartSec=15
KillMode=mixed
TimeoutStopSec=60
# The agent and the process that trains, together.
MemoryMax={memory}
TasksMax=512
LimitCORE=0

NoNewPrivileges=yes
CapabilityBoundingSet=
AmbientCapabilities=
PrivateUsers=yes
ProtectSystem=strict
ProtectHome=read-only
ReadWritePaths={folder}
PrivateTmp=yes
PrivateMounts=yes
{devices}
ProtectProc=invisible
ProtectClock=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
ProtectControlGroups=yes
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX
LockPersonality=yes
RemoveIPC=yes
KeyringMode=private
SystemCallArchitectures=native
# seccomp: the agent takes the network away from the process that trains.
SystemCallFilter=@system-service seccomp
SystemCallFilter=~@privileged @obsolete
SystemCallErrorNumber=EPERM

[Install]
WantedBy={target}
"""

_USER = """\
To install it, without root:
#   cloister-site service > ~/.config/systemd/user/cloister-agent.service
#   systemctl --user daemon-reload && systemctl --user enable --now cloister-agent
#   loginctl enable-linger              (so that it runs while nobody is logged in)
# To read its log: journalctl --user -u cloister-agent"""

_SYSTEM = """\
To install it, as root:
#   cloister-site service --system > /etc/systemd/system/cloister-agent.service
#   systemctl daemon-reload && systemctl enable --now cloister-agent
# To read its log: journalctl -u cloister-agent"""

_GPU = "# A GPU's devices are open to it; with PrivateDevices=yes they would not be.\nPrivateDevices=no"


def unit(site_yaml: Path, site: str, *, system: bool = False, memory: str = "16G", gpu: bool = False) -> str:
    """The unit file, with how to install it on top. ``memory`` as systemd writes it."""
    folder = site_yaml.resolve().parent
    return _UNIT.format(
        site=_bare(site),
        where=_SYSTEM if system else _USER,
        account=f"User={account().removeprefix('account ')}\n" if system else "",
        python=_quoted(sys.executable),
        site_yaml=_quoted(str(folder / site_yaml.name)),
        folder=_quoted(str(folder)),
        where_it_works=_bare(str(folder)),
        memory=memory,
        devices=_GPU if gpu else "PrivateDevices=yes",
        target="multi-user.target" if system else "default.target",
    )


def _bare(text: str) -> str:
    """As systemd reads it without quotes: a percent sign would begin a specifier."""
    return text.replace("%", "%%")


def _quoted(path: str) -> str:
    escaped = path.replace("\\", "\\\\").replace('"', '\\"').replace("$", "$$").replace("%", "%%")
    return f'"{escaped}"'
