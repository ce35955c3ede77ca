{{- define "shoal.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 30 | trimSuffix "-" }}
{{- end }}

{{/* At most 30 characters: names of zones and parts come after it, and a pod's name is a label. */}}
{{- define "shoal.fullname" -}}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 30 | trimSuffix "-" }}
{{- else if contains (include "shoal.name" .) .Release.Name }}
{{- .Release.Name | trunc 30 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name (include "shoal.name" .) | trunc 30 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{- define "shoal.selector" -}}
app.kubernetes.io/name: {{ include "shoal.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "shoal.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{ include "shoal.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}

{{- define "shoal.image" -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}
{{- end }}

{{- define "shoal.memberships" -}}
{{- .Values.memberships.secretName | default (printf "%s-memberships" (include "shoal.fullname" .)) }}
{{- end }}

{{/* dict "root" . "part" "node" */}}
{{- define "shoal.serviceAccount" -}}
{{- if .root.Values.serviceAccount.create }}
{{- printf "%s-%s" (include "shoal.fullname" .root) .part }}
{{- else }}
{{- .root.Values.serviceAccount.name }}
{{- end }}
{{- end }}

{{- define "shoal.keeperSocket" -}}
{{ .Values.nodes.runDir }}/keeper/keeper.sock
{{- end }}

{{- define "shoal.mirror" -}}
127.0.0.1:{{ .Values.mirror.port }}
{{- end }}

{{/* A value of TOML. Numbers of values files are floating point; every number of shoal.toml is whole. */}}
{{- define "shoal.tomlValue" -}}
{{- if kindIs "slice" . -}}
[{{ range $i, $item := . }}{{ if $i }}, {{ end }}{{ include "shoal.tomlValue" $item }}{{ end }}]
{{- else if kindIs "float64" . -}}
{{ printf "%.0f" . }}
{{- else -}}
{{ toJson . }}
{{- end -}}
{{- end }}

{{/* A configuration: what has no table goes first. */}}
{{- define "shoal.toml" -}}
# What the values of the chart say. docs/shoal.toml documents every option.
{{- range $key, $value := . }}{{- if not (kindIs "map" $value) }}
{{ $key }} = {{ include "shoal.tomlValue" $value }}
{{- end }}{{- end }}
{{- range $table, $options := . }}{{- if kindIs "map" $options }}
[{{ $table }}]
{{- range $key, $value := $options }}
{{ ternary $key ($key | quote) (regexMatch "^[A-Za-z0-9_-]+$" $key) }} = {{ include "shoal.tomlValue" $value }}
{{- end }}
{{- end }}{{- end }}
{{ end }}

{{/* What the chart decides cannot be configured besides: dict "part" "nodes" "config" ... */}}
{{- define "shoal.refuse" -}}
{{- $part := .part }}
{{- range $key := list "data_dir" "socket" "role" "zone" "capacity" "cluster" "http" "snapshotter" "pull_secrets" }}
{{- if hasKey $.config $key }}
{{- fail (printf "%s.config.%s is set by the chart: see values.yaml" $part $key) }}
{{- end }}
{{- end }}
{{- range $table := list "control" "data" "mirror" }}
{{- if hasKey (get $.config $table | default dict) "listen" }}
{{- fail (printf "%s.config.%s.listen is set by the chart: see ipFamily, ports and mirror" $part $table) }}
{{- end }}
{{- end }}
{{- end }}

{{/* Multiaddresses of the other zones' seed peers, and of this zone's: dict "root" . "zone" "a" "own" (list of them) */}}
{{- define "shoal.bootstrapPeers" -}}
{{- $peers := .own }}
{{- range .root.Values.zones }}
{{- if ne .name $.zone }}
{{- $peers = append $peers (include "shoal.seedAddress" (dict "root" $.root "zone" .name)) }}
{{- end }}
{{- end }}
{{- toJson $peers }}
{{- end }}

{{/* The name of the headless service, or with "pod" of one pod of it, as a multiaddress. */}}
{{- define "shoal.seedAddress" -}}
{{- $service := printf "%s-seed-%s" (include "shoal.fullname" .root) .zone }}
{{- $host := printf "%s.%s.svc" $service .root.Release.Namespace }}
{{- if hasKey . "pod" }}{{ $host = printf "%s-%d.%s" $service .pod $host }}{{ end }}
{{- printf "/dns/%s/tcp/%v" $host .root.Values.ports.control }}
{{- end }}

{{/* What all daemons have in common: dict "root" . "zone" "a" "peers" (JSON) */}}
{{- define "shoal.commonConfig" -}}
{{- $values := .root.Values }}
zone: {{ .zone | quote }}
cluster:
  public_key: {{ $values.cluster.publicKey | quote }}
  insecure_open: {{ $values.cluster.insecureOpen }}
control:
  bootstrap_peers: {{ .peers }}
registry:
  authfile: {{ ternary "/etc/shoal/registry/config.json" "" (ne $values.registry.authSecret "") | quote }}
  ca_files: {{ ternary (list "/etc/shoal/ca/ca.crt") list (ne $values.registry.caConfigMap "") | toJson }}
{{- if $values.pullSecrets.enabled }}
pull_secrets:
  kubeconfig: in-cluster
  namespaces: {{ toJson $values.pullSecrets.namespaces }}
{{- end }}
{{- end }}

{{- define "shoal.nodeConfig" -}}
{{- $values := .root.Values }}
{{- include "shoal.refuse" (dict "part" "nodes" "config" $values.nodes.config) }}
{{- $own := list (include "shoal.seedAddress" .) }}
{{- $peers := include "shoal.bootstrapPeers" (dict "root" .root "zone" .zone "own" $own) }}
{{- $common := include "shoal.commonConfig" (dict "root" .root "zone" .zone "peers" $peers) | fromYaml }}
{{- $own := dict
  "data_dir" $values.nodes.dataDir
  "socket" (printf "%s/shoal.sock" $values.nodes.runDir)
  "role" "node"
  "snapshotter" (dict "socket" (printf "%s/containerd.sock" $values.nodes.runDir) "name" $values.nodes.snapshotter)
  "mounts" (dict
    "on_stop" "leave"
    "keeper" (ternary "off" "auto" (eq $values.keeper.kind "none"))
    "keeper_socket" (include "shoal.keeperSocket" .root)
    "keeper_patience" $values.keeper.patience) }}
{{- if $values.nodes.containerdSocket }}
{{- $_ := set $own.snapshotter "containerd" $values.nodes.containerdSocket }}
{{- end }}
{{- if $values.mirror.enabled }}
{{- if not $values.nodes.hostNetwork }}
{{- fail "mirror.enabled takes nodes.hostNetwork: the mirror listens on loopback, and containerd is on the host" }}
{{- end }}
{{- $_ := set $own "mirror" (dict "listen" (include "shoal.mirror" .root)) }}
{{- end }}
{{- include "shoal.toml" (mustMergeOverwrite $common $own (deepCopy $values.nodes.config)) }}
{{- end }}

{{- define "shoal.seedConfig" -}}
{{- $values := .root.Values }}
{{- include "shoal.refuse" (dict "part" "seeds" "config" $values.seeds.config) }}
{{- /* Each by its own name, not by that of the service: who finds itself behind a name gives up that name. */}}
{{- $own := list }}
{{- range $pod := until (int $values.seeds.replicas) }}
{{- $own = append $own (include "shoal.seedAddress" (dict "root" $.root "zone" $.zone "pod" $pod)) }}
{{- end }}
{{- $peers := include "shoal.bootstrapPeers" (dict "root" .root "zone" .zone "own" $own) }}
{{- $common := include "shoal.commonConfig" (dict "root" .root "zone" .zone "peers" $peers) | fromYaml }}
{{- $own := dict
  "data_dir" "/var/lib/shoal/store"
  "socket" "/run/shoal/shoal.sock"
  "role" "seed"
  "capacity" (int $values.seeds.capacity)
  "mounts" (dict "keeper" "off") }}
{{- include "shoal.toml" (mustMergeOverwrite $common $own (deepCopy $values.seeds.config)) }}
{{- end }}

{{/* dict "root" . "dir" "/var/lib/shoal" */}}
{{- define "shoal.identityContainer" -}}
name: identity
image: {{ include "shoal.image" .root }}
imagePullPolicy: {{ .root.Values.image.pullPolicy }}
# Says who the node is, in its log and in the pod's status, where issue-memberships reads it.
command: [sh, -ec, 'umask 077; mkdir -p "$0"; chmod 700 "$0"; id=$(shoal identity --data-dir "$0"); echo "$id" | tee /dev/termination-log']
args: [{{ .dir | quote }}]
{{- end }}

{{/* dict "root" . "key" "node-$(NODE_NAME)" "from" "spec.nodeName" */}}
{{- define "shoal.membershipContainer" -}}
name: membership
image: {{ include "shoal.image" .root }}
imagePullPolicy: {{ .root.Values.image.pullPolicy }}
command: [sh, -ec, 'until [ -s "$0" ]; do echo "waiting for a certificate of membership in $0"; sleep 5; done; shoal cluster show "$0"']
args: [{{ printf "/etc/shoal/memberships/%s" .key | quote }}]
env:
  - name: NAME
    valueFrom:
      fieldRef:
        fieldPath: {{ .from }}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  runAsNonRoot: true
  runAsUser: 65532
  runAsGroup: 65532
  capabilities:
    drop: [ALL]
  seccompProfile:
    type: RuntimeDefault
resources:
  requests:
    cpu: 10m
    memory: 16Mi
volumeMounts:
  - name: memberships
    mountPath: /etc/shoal/memberships
    readOnly: true
{{- end }}

{{/* The pod's own address, or the host's. A host has others besides, sometimes thousands, at which it is not reached. */}}
{{- define "shoal.listen" -}}
{{- $six := eq .Values.ipFamily "IPv6" }}
{{- $host := ternary "[$(POD_IP)]" "$(POD_IP)" $six }}
- --set=control.listen=["/{{ ternary "ip6" "ip4" $six }}/$(POD_IP)/tcp/{{ .Values.ports.control }}"]
- --set=data.listen="{{ $host }}:{{ .Values.ports.data }}"
- --set=http.listen="{{ $host }}:{{ .Values.ports.http }}"
{{- end }}

{{- define "shoal.environment" -}}
- name: NODE_NAME
  valueFrom:
    fieldRef:
      fieldPath: spec.nodeName
- name: POD_IP
  valueFrom:
    fieldRef:
      fieldPath: status.podIP
{{- end }}

{{- define "shoal.daemonPorts" -}}
- name: control
  containerPort: {{ .Values.ports.control }}
  protocol: TCP
- name: data
  containerPort: {{ .Values.ports.data }}
  protocol: TCP
- name: data-udp
  containerPort: {{ .Values.ports.data }}
  protocol: UDP
- name: http
  containerPort: {{ .Values.ports.http }}
  protocol: TCP
{{- end }}

{{/* A start waits for the mounts of the last run to be tried; ready is who has them back. */}}
{{- define "shoal.probes" -}}
startupProbe:
  httpGet:
    path: /healthz
    port: http
  periodSeconds: 2
  failureThreshold: 150
livenessProbe:
  httpGet:
    path: /healthz
    port: http
  periodSeconds: 20
  timeoutSeconds: 10
  failureThreshold: 6
readinessProbe:
  httpGet:
    path: /readyz
    port: http
  periodSeconds: 5
  timeoutSeconds: 5
{{- end }}

{{- define "shoal.configMounts" -}}
- name: config
  mountPath: /etc/shoal/shoal.toml
  subPath: shoal.toml
  readOnly: true
{{- if .Values.cluster.publicKey }}
- name: memberships
  mountPath: /etc/shoal/memberships
  readOnly: true
{{- end }}
{{- if .Values.registry.authSecret }}
- name: registry
  mountPath: /etc/shoal/registry
  readOnly: true
{{- end }}
{{- if .Values.registry.caConfigMap }}
- name: ca
  mountPath: /etc/shoal/ca
  readOnly: true
{{- end }}
{{- if .Values.pullSecrets.enabled }}
- name: api
  mountPath: /var/run/secrets/kubernetes.io/serviceaccount
  readOnly: true
{{- end }}
{{- end }}

{{/* dict "root" . "config" (name of the ConfigMap) */}}
{{- define "shoal.configVolumes" -}}
- name: config
  configMap:
    name: {{ .config }}
{{- if .root.Values.cluster.publicKey }}
- name: memberships
  secret:
    secretName: {{ include "shoal.memberships" .root }}
    # Without it pods wait, as without a certificate in it.
    optional: true
    # Read by daemons of any user. It is no secret: only the node with that identity can use it.
    defaultMode: 0444
{{- end }}
{{- if .root.Values.registry.authSecret }}
- name: registry
  secret:
    secretName: {{ .root.Values.registry.authSecret }}
    items:
      - key: .dockerconfigjson
        path: config.json
{{- end }}
{{- if .root.Values.registry.caConfigMap }}
- name: ca
  configMap:
    name: {{ .root.Values.registry.caConfigMap }}
    items:
      - key: ca.crt
        path: ca.crt
{{- end }}
{{- if .root.Values.pullSecrets.enabled }}
# What a pod shows to the API server. For the daemon's container alone: the others have nothing to ask.
- name: api
  projected:
    sources:
      - serviceAccountToken:
          path: token
          expirationSeconds: 3600
      - configMap:
          name: kube-root-ca.crt
          items:
            - key: ca.crt
              path: ca.crt
{{- end }}
{{- end }}

{{/* What members use between each other, for policies. */}}
{{- define "shoal.planePorts" -}}
- port: {{ .Values.ports.control }}
  protocol: TCP
- port: {{ .Values.ports.data }}
  protocol: TCP
- port: {{ .Values.ports.data }}
  protocol: UDP
{{- end }}
