#!/usr/bin/env python3
"""Damages manifests in one way after another, and expects `check.py` to notice each: `check_test.py REPOSITORY EVERYTHING.yaml OTHER.yaml`.

The first file is of the value set `everything`, the second of one whose keeper is a pod.
"""

import sys
import tempfile
import tomllib
from pathlib import Path

import check

# A text of the first manifests, what takes its place, and what is said of it.
DAMAGES = [
    ("mountPath: /run/shoal\n", "mountPath: /run/shawl\n", "which is not mounted so"),
    ("- name: run\n              mountPath", "- name: ran\n              mountPath", "which is no volume"),
    ("max_bytes = ", "max_byte = ", "is no option of docs/shoal.toml"),
    ("threads = 8", 'threads = true', "is of another type"),
    ("/dns/images-seed-eu-1b.images.svc", "/dns/images-seeds-eu-1b.images.svc", "is not the name of a headless service"),
    ("/dns/images-seed-eu-1a-2.", "/dns/images-seed-eu-1a-3.", "is none of the pods"),
    ("serviceName: images-seed-eu-1a", "serviceName: images-seed", "which is not there"),
    ("targetPort: control", "targetPort: controls", "which no container has"),
    ("port: http\n            periodSeconds: 5", "port: https\n            periodSeconds: 5", "asks a port that is not there"),
    ("privileged: true\n            readOnlyRootFilesystem: true\n          ports", "readOnlyRootFilesystem: true\n          ports", "nothing it mounts would be seen"),
    ("runAsNonRoot: true", "runAsNonRoot: false", "may run as root"),
    ("hostPID: true", "hostPID: false", "does not see the host's systemd"),
    ("keeper_socket = \"/run/shoal/keeper/keeper.sock\"", "keeper_socket = \"/run/keeper.sock\"", "the keeper is expected at"),
    ("automountServiceAccountToken: false\n      enable", "automountServiceAccountToken: true\n      enable", "gets a token"),
    ("key: ca.crt", "key: ca.pem", "which is not there"),
    ("memberships/seed-$(POD_NAME)", "memberships/seed-$(HOSTNAME)", "which is not set"),
    ("tcp/4801\"]\n", "tcp/4811\"]\n", "the daemon listens on 4811"),
    ("role = \"seed\"", "role = \"node\"", "by which certificates are issued"),
    ("port: http\n      path: /metrics", "port: metrics\n      path: /metrics", "watches a port that no service has"),
    ("kubeconfig = \"in-cluster\"", "kubeconfig = \"\"", "does not ask it"),
    ("path: token", "path: tokens", "has no token of the API"),
    ("kind: RoleBinding\nmetadata:\n  name: images-pull-secrets\n  namespace: team-b", "kind: RoleBinding\nmetadata:\n  name: images-pull-secrets\n  namespace: team-c", "may do so in"),
    ("secretName: registry-credentials", "secretName: registry-credential", "needs the Secret registry-credential"),
]
OTHER = [("--socket=/run/shoal/keeper/keeper.sock", "--socket=/run/keeper.sock", "the keeper is expected at")]


def main():
    root = Path(sys.argv[1])
    options = tomllib.loads((root / "docs/shoal.toml").read_text())
    tried = 0
    with tempfile.TemporaryDirectory() as folder:
        damaged = Path(folder) / "damaged.yaml"
        for path, damages in zip(sys.argv[2:], [DAMAGES, OTHER]):
            text = Path(path).read_text()
            for before, after, expected in damages:
                if before not in text:
                    sys.exit(f"check_test: {before!r} is not in {path}")
                damaged.write_text(text.replace(before, after))
                faults = check.Release(damaged, options).check()
                if not any(expected in fault for fault in faults):
                    sys.exit(f"check_test: {after!r} was not noticed: {faults}")
                tried += 1
    print(f"chart: {tried} damages, all noticed")


if __name__ == "__main__":
    main()
