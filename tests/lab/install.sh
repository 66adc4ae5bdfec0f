#!/usr/bin/env bash
# Install what the lab needs from Debian; nothing to do where it is there already.
set -euo pipefail
missing=()
for program in slurmctld:slurm-wlm slurmdbd:slurmdbd mariadbd:mariadb-server munged:munge ip:iproute2 nsenter:util-linux sshd:openssh-server ssh:openssh-client; do
  PATH="$PATH:/usr/sbin:/sbin" command -v "${program%%:*}" >/dev/null || missing+=("${program##*:}")
done
if [ ${#missing[@]} -eq 0 ]; then exit 0; fi
# The packages start services of their own where they can; the lab uses none of them.
policy=/usr/sbin/policy-rc.d
if [ ! -e $policy ]; then
  printf '#!/bin/sh\nexit 101\n' > $policy && chmod 755 $policy
  trap 'rm -f $policy' EXIT
fi
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}"
