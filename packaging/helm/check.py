#!/usr/bin/env python3
"""Checks what `helm template` has made of the chart: `check.py REPOSITORY MANIFESTS.yaml...`.

Schemas say what a field may be; this says whether the parts fit together, and whether the daemon would take its configuration: every
option is one that docs/shoal.toml documents, of the same type, and the files that it names are mounted. Prints one line for each
fault, and exits 1 if there are any.
"""

import json
import re
import sys
import tomllib
from pathlib import Path, PurePosixPath

import yaml

# What users bring along, by the names that the value sets of this folder use.
BROUGHT = {("Secret", "registry-credentials"), ("Secret", "own-memberships"), ("ConfigMap", "registry-ca")}
BROUGHT_KEYS = {"registry-credentials": {".dockerconfigjson"}, "registry-ca": {"ca.crt"}}
# Written by the operator's tool after the installation.
FILLED_LATER = re.compile(r"(own|.*)-memberships$")


class Release:
    """Everything that one set of values gives."""

    def __init__(self, path, options):
        self.path = path
        self.options = options
        self.faults = []
        self.objects = {}
        for document in yaml.safe_load_all(path.read_text()):
            if not document:
                continue
            key = (document["kind"], document["metadata"]["name"])
            if document["kind"] in ("Role", "RoleBinding"):
                # These may be in other namespaces, too.
                key += (document["metadata"]["namespace"],)
            if key in self.objects:
                self.fault(key, "is there twice")
            self.objects[key] = document

    def fault(self, key, text):
        self.faults.append(f"{self.path.name}: {key[0]} {key[1]}: {text}")

    def of_kind(self, *kinds):
        return [(key, value) for key, value in self.objects.items() if key[0] in kinds]

    def check(self):
        for key, _ in self.objects.items():
            if len(key[1]) > 63:
                self.fault(key, "has a name that is too long for a label")
        for key, workload in self.of_kind("DaemonSet", "StatefulSet"):
            self.workload(key, workload)
        for key, service in self.of_kind("Service"):
            self.selected(key, service["spec"]["selector"], service["spec"]["ports"])
        for key, budget in self.of_kind("PodDisruptionBudget"):
            self.selected(key, budget["spec"]["selector"]["matchLabels"], [])
        for key, binding in self.of_kind("RoleBinding", "ClusterRoleBinding"):
            role = (binding["roleRef"]["kind"], binding["roleRef"]["name"])
            if not any(other[:2] == role for other in self.objects):
                self.fault(key, f"binds to {role[1]}, which is not there")
            for subject in binding["subjects"]:
                if (subject["kind"], subject["name"]) not in self.objects:
                    self.fault(key, f"binds {subject['name']}, which is not there")
        for key, monitor in self.of_kind("ServiceMonitor"):
            labels = monitor["spec"]["selector"]["matchLabels"].items()
            services = [s for _, s in self.of_kind("Service") if labels <= s["metadata"]["labels"].items()]
            ports = {port["name"] for service in services for port in service["spec"]["ports"]}
            if not services or any(endpoint["port"] not in ports for endpoint in monitor["spec"]["endpoints"]):
                self.fault(key, "watches a port that no service has")
        return self.faults

    def pods(self):
        return [workload["spec"]["template"] for _, workload in self.of_kind("DaemonSet", "StatefulSet")]

    def selected(self, key, selector, ports):
        pods = [pod for pod in self.pods() if selector.items() <= pod["metadata"]["labels"].items()]
        if len(pods) != 1:
            self.fault(key, f"selects the pods of {len(pods)} workloads")
        for pod in pods:
            names = {port["name"] for container in pod["spec"]["containers"] for port in container.get("ports", [])}
            for port in ports:
                if port["targetPort"] not in names:
                    self.fault(key, f"leads to the port {port['targetPort']}, which no container has")

    def workload(self, key, workload):
        template = workload["spec"]["template"]
        selector = workload["spec"]["selector"]["matchLabels"]
        if not selector.items() <= template["metadata"]["labels"].items():
            self.fault(key, "does not select its own pods")
        self.selected(key, selector, [])
        pod = template["spec"]
        for name in ("Service", workload["spec"].get("serviceName")), ("ServiceAccount", pod["serviceAccountName"]):
            if name[1] not in (None, "default") and name not in self.objects:
                self.fault(key, f"names {name[1]}, which is not there")
        claims = {claim["metadata"]["name"]: {} for claim in workload["spec"].get("volumeClaimTemplates", [])}
        volumes = {volume["name"]: volume for volume in pod.get("volumes", [])} | claims
        used = set()
        for container in pod.get("initContainers", []) + pod["containers"]:
            used |= self.container(key, pod, container, volumes)
        for name in volumes.keys() - used:
            self.fault(key, f"has the volume {name}, which no container mounts")
        self.security(key, pod)

    def container(self, key, pod, container, volumes):
        name = container["name"]
        mounts = container.get("volumeMounts", [])
        for mount in mounts:
            volume = volumes.get(mount["name"])
            if volume is None:
                self.fault(key, f"{name} mounts {mount['name']}, which is no volume")
                continue
            keys = self.keys(key, volume)
            if "subPath" in mount and keys is not None and mount["subPath"] not in keys:
                self.fault(key, f"{name} mounts {mount['subPath']}, which {mount['name']} does not have")
            if mount.get("mountPropagation") == "Bidirectional" and not container["securityContext"].get("privileged"):
                self.fault(key, f"{name} is not privileged, so nothing it mounts would be seen")
        ports = {port["name"] for port in container.get("ports", [])}
        for probe in "startupProbe", "livenessProbe", "readinessProbe":
            if probe in container and container[probe]["httpGet"]["port"] not in ports:
                self.fault(key, f"{name}: {probe} asks a port that is not there")
        variables = {variable["name"] for variable in container.get("env", [])}
        words = container.get("command", []) + container.get("args", [])
        # Of shells, $0 and what a command prints; `$(NAME)` is the kubelet's.
        for variable in re.findall(r"\$\(([A-Z_]+)\)", " ".join(words)):
            if variable not in variables:
                self.fault(key, f"{name} uses {variable}, which is not set")
        if "daemon" in words:
            self.daemon(key, pod, container, volumes, words)
        return {mount["name"] for mount in mounts}

    def keys(self, key, volume):
        """The files of a volume; none where anything may be in it, or there is no such volume."""
        if volume is None:
            return None
        for kind, field, name in ("ConfigMap", "configMap", "name"), ("Secret", "secret", "secretName"):
            if field not in volume:
                continue
            source = volume[field][name]
            there = self.objects.get((kind, source))
            if there is None and (kind, source) not in BROUGHT and not volume[field].get("optional"):
                self.fault(key, f"needs the {kind} {source}, which is not there")
                return None
            if FILLED_LATER.match(source) and kind == "Secret":
                return None
            keys = set(there.get("data", {})) if there else BROUGHT_KEYS.get(source, set())
            for item in volume[field].get("items", []):
                if item["key"] not in keys:
                    self.fault(key, f"needs {item['key']} of {source}, which is not there")
            return {item["path"] for item in volume[field].get("items", [])} or keys
        return None

    def daemon(self, key, pod, container, volumes, words):
        mounts = {PurePosixPath(mount["mountPath"]): mount for mount in container["volumeMounts"]}
        path = next(word.removeprefix("--config=") for word in words if word.startswith("--config="))
        mount = mounts[PurePosixPath(path)]
        source = volumes[mount["name"]]["configMap"]["name"]
        config = tomllib.loads(self.objects["ConfigMap", source]["data"][mount["subPath"]])
        for word in words:
            if word.startswith("--set="):
                option, value = word.removeprefix("--set=").split("=", 1)
                parsed = tomllib.loads(f"{option} = {value}")
                for table, options in parsed.items():
                    config.setdefault(table, {}).update(options)
        self.known(key, "", config, self.options)

        # What is read and what is written, and whether it is a file that the pod has.
        written = [config["data_dir"], config["socket"]]
        written += [value for value in [config.get("snapshotter", {}).get("socket")] if value]
        cluster, registry = config["cluster"], config["registry"]
        read = [cluster["membership"]] if cluster["public_key"] else []
        read += [registry["authfile"]] if registry["authfile"] else []
        read += registry["ca_files"]
        for path, writable in [(path, True) for path in written] + [(path, False) for path in read]:
            above = [mounts[folder] for folder in [PurePosixPath(path), *PurePosixPath(path).parents] if folder in mounts]
            if not above or above[0].get("readOnly", False) == writable:
                self.fault(key, f"the daemon {'writes' if writable else 'reads'} {path}, which is not mounted so")
                continue
            keys = self.keys(key, volumes.get(above[0]["name"]))
            if keys is not None and PurePosixPath(path).name not in keys:
                self.fault(key, f"the daemon reads {path}, which is not there")
        self.peers(key, config)
        self.keeper(key, pod, config)
        self.pull_secrets(key, pod, config, mounts, volumes)
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        listens = {
            "control": int(config["control"]["listen"][0].rsplit("/", 1)[1]),
            "data": int(config["data"]["listen"].rsplit(":", 1)[1]),
            "http": int(config["http"]["listen"].rsplit(":", 1)[1]),
        }
        for name, port in listens.items():
            if ports[name] != port:
                self.fault(key, f"the daemon listens on {port}, but the port {name} is {ports[name]}")
        component = self.objects[key]["spec"]["template"]["metadata"]["labels"]
        if (config["role"], config["zone"]) != (component["app.kubernetes.io/component"], component["shoal/zone"]):
            self.fault(key, "role or zone are not those of the labels, by which certificates are issued")

    def known(self, key, prefix, config, options):
        for option, value in config.items():
            name = prefix + option
            if option not in options:
                self.fault(key, f"{name} is no option of docs/shoal.toml")
            elif name == "labels":
                if not all(isinstance(text, str) for text in value.values()):
                    self.fault(key, "labels are texts")
            elif isinstance(value, dict):
                self.known(key, f"{name}.", value, options[option])
            # Sizes may be texts.
            elif type(value) is not type(options[option]) and not (isinstance(value, str) and type(options[option]) is int):
                self.fault(key, f"{name} is of another type than in docs/shoal.toml")

    def pull_secrets(self, key, pod, config, mounts, volumes):
        """Who asks the API server has a token, an authority, and the right to; nobody else has any of it."""
        asks = config.get("pull_secrets", {}).get("kubeconfig") == "in-cluster"
        mount = mounts.get(PurePosixPath("/var/run/secrets/kubernetes.io/serviceaccount"))
        if asks != (mount is not None):
            self.fault(key, "has a token of the API and does not ask it, or the other way round")
        if not asks or mount is None:
            return
        sources = volumes[mount["name"]]["projected"]["sources"]
        paths = {source["serviceAccountToken"]["path"] for source in sources if "serviceAccountToken" in source}
        paths |= {item["path"] for source in sources for item in source.get("configMap", {}).get("items", [])}
        if not paths >= {"token", "ca.crt"}:
            self.fault(key, "has no token of the API, or no authority")
        namespaces = set(config["pull_secrets"]["namespaces"]) or {None}
        bound = {
            binding["metadata"].get("namespace")
            for _, binding in self.of_kind("RoleBinding", "ClusterRoleBinding")
            if binding["metadata"]["name"].endswith("-pull-secrets")
            and pod["serviceAccountName"] in [subject["name"] for subject in binding["subjects"]]
        }
        if bound != namespaces:
            self.fault(key, f"watches secrets of {namespaces} and may do so in {bound}")

    def peers(self, key, config):
        if not config["control"]["bootstrap_peers"]:
            self.fault(key, "the daemon would find nobody")
        for peer in config["control"]["bootstrap_peers"]:
            found = re.fullmatch(r"/dns/([^/]+)/tcp/(\d+)", peer)
            if not found:
                self.fault(key, f"{peer} is not the name of a service")
                continue
            labels = found[1].split(".")
            service = labels[-3]
            there = self.objects.get(("Service", service))
            if there is None or there["spec"]["clusterIP"] != "None" or labels[-1] != "svc":
                self.fault(key, f"{peer} is not the name of a headless service")
                continue
            if int(found[2]) not in [port["port"] for port in there["spec"]["ports"]]:
                self.fault(key, f"{peer} is not a port of that service")
            if len(labels) == 4:
                replicas = self.objects["StatefulSet", service]["spec"]["replicas"]
                if labels[0] not in [f"{service}-{n}" for n in range(replicas)]:
                    self.fault(key, f"{peer} is none of the pods")

    def keeper(self, key, pod, config):
        mounts = config["mounts"]
        if mounts["keeper"] == "off":
            return
        sockets = []
        for _, other in self.of_kind("DaemonSet"):
            keeper = other["spec"]["template"]["spec"]
            for container in keeper["containers"]:
                if "keeper" in container["args"]:
                    sockets += [a.removeprefix("--socket=") for a in container["args"] if a.startswith("--socket=")]
        units = [container["args"][1] for container in pod["initContainers"] if container["name"] == "keeper"]
        sockets += units
        if units and not pod.get("hostPID"):
            self.fault(key, "what installs the keeper's unit does not see the host's systemd")
        if sockets != [mounts["keeper_socket"]]:
            self.fault(key, f"the keeper is expected at {mounts['keeper_socket']}, and is at {sockets}")

    def security(self, key, pod):
        """Who may be privileged, and that nobody else is."""
        if pod.get("automountServiceAccountToken") is not False:
            self.fault(key, "gets a token for the API")
        component = self.objects[key]["metadata"]["labels"]["app.kubernetes.io/component"]
        for container in pod.get("initContainers", []) + pod["containers"]:
            context = pod.get("securityContext", {}) | container["securityContext"]
            privileged = context.get("privileged", False)
            may_be = component == "node" and container["name"] in ("shoal", "keeper")
            if privileged and not may_be:
                self.fault(key, f"{container['name']} is privileged")
            if not context.get("readOnlyRootFilesystem"):
                self.fault(key, f"{container['name']} can write to its image")
            bounded = context.get("capabilities", {}).get("drop") == ["ALL"] and not context.get("allowPrivilegeEscalation", True)
            if not privileged and not (bounded and context.get("seccompProfile", {}).get("type") == "RuntimeDefault"):
                self.fault(key, f"{container['name']} has capabilities or system calls that it does not need")
            if component == "seed" and not context.get("runAsNonRoot"):
                self.fault(key, f"{container['name']} may run as root")
        for volume in pod.get("volumes", []):
            if component == "seed" and "hostPath" in volume:
                self.fault(key, f"{volume['name']} is a folder of the host")


def undocumented(chart):
    """Values without a comment, and values that the schema does not have or the other way round."""
    text = (chart / "values.yaml").read_text().splitlines()
    schema = json.loads((chart / "values.schema.json").read_text())

    def paths(node, prefix=""):
        for name, child in node.get("properties", {}).items():
            yield prefix + name
            yield from paths(child, f"{prefix}{name}.")

    def given(values, known, prefix=""):
        for name, value in values.items():
            yield prefix + name
            if isinstance(value, dict) and f"{prefix}{name}." in known:
                yield from given(value, known, f"{prefix}{name}.")

    known = set(paths(schema))
    tables = {path.rsplit(".", 1)[0] + "." for path in known if "." in path}
    values = set(given(yaml.safe_load((chart / "values.yaml").read_text()), tables))
    for path in sorted((known - {"global"}) ^ values):
        yield f"values: {path} is only in one of values.yaml and values.schema.json"
    # Consecutive lines without a comment between them are documented by the one above the first of them.
    commented = False
    for number, line in enumerate(text, 1):
        if not line.strip():
            commented = False
        elif line.lstrip().startswith("#"):
            commented = True
        elif re.match(r"[a-zA-Z]+:", line) and not line.endswith(":") and not commented:
            yield f"values.yaml:{number}: nothing says what this is"


def main():
    root = Path(sys.argv[1])
    options = tomllib.loads((root / "docs/shoal.toml").read_text())
    faults = list(undocumented(root / "packaging/helm/shoal"))
    objects = 0
    for path in sys.argv[2:]:
        release = Release(Path(path), options)
        faults += release.check()
        objects += len(release.objects)
    for fault in faults:
        print(fault, file=sys.stderr)
    print(f"chart: {objects} objects of {len(sys.argv) - 2} releases, {len(faults)} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
