//! Hosts in network namespaces: a router per zone, a backbone router between the zones and the registry, and `tbf` on
//! both ends of every host's link, and of a zone's where the scenario limits that.
//!
//! ```text
//! host 10.77.z.n -- h<n> [zone z] uplink -- 10.78.z.0/30 -- down<z> [backbone] registry -- 10.77.0.1
//! ```
//!
//! Routers and no bridges, because the kernel keeps one table of neighbours for all namespaces, with room for a thousand:
//! here each host has one neighbour. Whoever is cut off hears nothing at all, as behind a cable that was pulled.

use std::{collections::BTreeMap, fs, net::Ipv4Addr, path::Path, process::Command};

use shoal::command::Failure;
use shoal_sim::{Role, Scenario};

use super::tool;

/// 10.77.0.0: the third byte is the zone, the fourth the host; the registry is 10.77.0.1.
const NETWORK: u32 = u32::from_be_bytes([10, 77, 0, 0]);

/// What every host calls its router.
const GATEWAY: &str = "169.254.1.1";

/// Hosts that have an address.
const MAX_HOSTS: usize = 250;

/// Where `ip netns` keeps the namespaces.
pub(crate) const NAMESPACES: &str = "/run/netns";

/// What a shaped link sends at once, at its rate: short enough to not be felt, long enough for the kernel's batches.
const BURST_MS: f64 = 10.0;

/// Smallest burst, in bytes: one batch of the kernel's segmentation.
const MIN_BURST: f64 = 65_536.0;

/// Segments that a sender hands over at a time, as it would to a network card. At these rates the kernel would send two or three, and
/// the cores of this machine carry each batch over four links.
const BATCH: &str = "16";

/// How senders find their rate: the plain way, which every kernel lets a namespace have. BBR, the default of some hosts, takes the
/// microseconds of an empty link in memory for a rate of gigabits, and then loses a tenth of what it sends.
const CONGESTION_CONTROL: &str = "reno";

/// How long a packet waits for a shaped link before it is dropped.
const QUEUE: &str = "100ms";

/// One host.
#[derive(Debug, Clone)]
pub(crate) struct Host {
    namespace: String,
    pub(crate) address: Ipv4Addr,
    /// The router that it hangs on, and its port there.
    router: String,
    port: String,
    pub(crate) zone: String,
    pub(crate) role: Role,
}

impl Host {
    /// A command that runs `program` on this host. The file systems are everyone's: what it mounts is seen here.
    pub(crate) fn command(&self, program: &Path) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={NAMESPACES}/{}", self.namespace)).arg("--").arg(program);
        command
    }
}

/// See the module. Dropping it removes everything.
#[derive(Debug)]
pub(crate) struct Network {
    prefix: String,
    zones: Vec<String>,
    hosts: Vec<Host>,
    registry: Host,
}

/// Bytes that went over links, headers included.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Links {
    /// From one zone to another.
    pub(super) cross_zone: u64,
    /// To the registry.
    pub(super) to_registry: u64,
    /// From the registry.
    pub(super) from_registry: u64,
}

impl Links {
    pub(super) fn since(self, before: &Self) -> Self {
        Self {
            cross_zone: self.cross_zone.saturating_sub(before.cross_zone),
            to_registry: self.to_registry.saturating_sub(before.to_registry),
            from_registry: self.from_registry.saturating_sub(before.from_registry),
        }
    }
}

/// Refuses a machine that cannot do it, in words.
pub(crate) fn check_tools() -> Result<(), Failure> {
    if !rustix::process::geteuid().is_root() || !Path::new("/dev/fuse").exists() {
        return Err("namespaces and mounts need root and /dev/fuse".into());
    }
    tool("ip", &["-V"], "")?;
    tool("tc", &["-V"], "")?;
    tool("nsenter", &["--version"], "")?;
    Ok(())
}

impl Network {
    pub(crate) fn create(scenario: &Scenario) -> Result<Self, Failure> {
        remove_stale();
        let prefix = format!("shoal-{}-", std::process::id());
        let zones: Vec<_> = scenario.zones.iter().map(|zone| zone.name.clone()).collect();
        let groups: Vec<_> =
            scenario.nodes.iter().flat_map(|group| std::iter::repeat_n(group, group.count)).collect();
        let host = |n: usize, zone: usize, name: &str, role| Host {
            namespace: format!("{prefix}h{n}"),
            address: Ipv4Addr::from(NETWORK + ((zone as u32) << 8) + n as u32),
            router: if zone == 0 { format!("{prefix}backbone") } else { format!("{prefix}zone{zone}") },
            port: format!("h{n}"),
            zone: name.to_owned(),
            role,
        };
        let hosts = groups.iter().enumerate().map(|(n, group)| {
            let zone = zones.iter().position(|zone| *zone == group.zone).unwrap_or_default();
            host(n + 2, zone + 1, &group.zone, group.role)
        });
        let network = Self { registry: host(1, 0, "", Role::Seed), hosts: hosts.collect(), prefix, zones };
        if network.hosts.len() > MAX_HOSTS || network.zones.len() > MAX_HOSTS {
            return Err(format!("{} hosts: {MAX_HOSTS} have an address", network.hosts.len()).into());
        }
        network.make_routers(scenario)?;
        network.attach(&network.registry, scenario.registry.egress_mbit, f64::INFINITY)?;
        for (host, group) in network.hosts.iter().zip(groups) {
            network.attach(host, group.up_mbit, group.down_mbit)?;
        }
        Ok(network)
    }

    pub(crate) fn hosts(&self) -> &[Host] {
        &self.hosts
    }

    pub(crate) fn registry(&self) -> &Host {
        &self.registry
    }

    /// The zone of the host with this address.
    pub(super) fn zone_of(&self, address: &std::net::IpAddr) -> Option<&str> {
        self.hosts.iter().find(|host| *address == host.address).map(|host| host.zone.as_str())
    }

    /// Cuts a zone off from the others and the registry, or joins it again.
    pub(super) fn switch_zone(&self, zone: &str, on: bool) -> Result<(), Failure> {
        let at = self.zones.iter().position(|name| name == zone).ok_or("no such zone")? + 1;
        let (out, into) = if on {
            (format!("default via 10.78.{at}.1"), format!("10.77.{at}.0/24 via 10.78.{at}.2"))
        } else {
            ("blackhole default".to_owned(), format!("blackhole 10.77.{at}.0/24"))
        };
        self.at_router(&format!("zone{at}"), &format!("route replace {out}\n"))?;
        self.at_router("backbone", &format!("route replace {into}\n"))
    }

    /// Cuts a host off from all others, or joins it again.
    pub(super) fn switch_host(&self, host: &Host, on: bool) -> Result<(), Failure> {
        let Host { router, port, address, .. } = host;
        let batch = if on {
            format!("link set {port} up\nroute replace {address} dev {port}\n")
        } else {
            format!("route replace blackhole {address}\nlink set {port} down\n")
        };
        tool("ip", &["-n", router, "-batch", "-"], &batch).map(drop)
    }

    /// What went over the links between the zones and to the registry since they were made.
    pub(super) fn counters(&self) -> Result<Links, Failure> {
        let backbone = self.router("backbone");
        let output = tool("ip", &["-n", &backbone, "-s", "-j", "link", "show"], "")?;
        let links: Vec<serde_json::Value> = serde_json::from_slice(&output)?;
        let bytes: BTreeMap<&str, (u64, u64)> = links
            .iter()
            .filter_map(|link| {
                let figure = |way: &str| link["stats64"][way]["bytes"].as_u64();
                Some((link["ifname"].as_str()?, (figure("rx")?, figure("tx")?)))
            })
            .collect();
        let port = |name: &str| bytes.get(name).copied().unwrap_or_default();
        let left_zones: u64 = (1..=self.zones.len()).map(|at| port(&format!("down{at}")).0).sum();
        // What the backbone receives on a port is what its other end has sent.
        let (from_registry, to_registry) = port(&self.registry.port);
        Ok(Links { cross_zone: left_zones.saturating_sub(to_registry), to_registry, from_registry })
    }

    fn router(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }

    fn at_router(&self, name: &str, batch: &str) -> Result<(), Failure> {
        tool("ip", &["-n", &self.router(name), "-batch", "-"], batch).map(drop)
    }

    fn make_routers(&self, scenario: &Scenario) -> Result<(), Failure> {
        let backbone = self.router("backbone");
        make_router(&backbone)?;
        for (at, described) in (1..).zip(&scenario.zones) {
            let zone = self.router(&format!("zone{at}"));
            make_router(&zone)?;
            let pair = format!("link add uplink netns {zone} type veth peer name down{at} netns {backbone}\n");
            tool("ip", &["-batch", "-"], &pair)?;
            self.at_router(
                &format!("zone{at}"),
                &format!("addr add 10.78.{at}.2/30 dev uplink\nlink set uplink up\n"),
            )?;
            self.at_router("backbone", &format!("addr add 10.78.{at}.1/30 dev down{at}\nlink set down{at} up\n"))?;
            let mbit = described.uplink_mbit.unwrap_or(f64::INFINITY);
            shape(&zone, "uplink", mbit)?;
            shape(&backbone, &format!("down{at}"), mbit)?;
        }
        self.zones.iter().try_for_each(|zone| self.switch_zone(zone, true))
    }

    fn attach(&self, host: &Host, up_mbit: f64, down_mbit: f64) -> Result<(), Failure> {
        let Host { namespace, router, port, address, .. } = host;
        tool("ip", &["netns", "add", namespace], "")?;
        let pair = format!("link add {port} netns {router} type veth peer name eth0 netns {namespace}\n");
        tool("ip", &["-batch", "-"], &pair)?;
        let own = format!(
            "addr add {address}/32 dev eth0\nlink set lo up\nlink set eth0 up\n\
             route add default via {GATEWAY} dev eth0 onlink\n"
        );
        tool("ip", &["-n", namespace, "-batch", "-"], &own)?;
        set(namespace, "tcp_min_tso_segs", BATCH)?;
        set(namespace, "tcp_congestion_control", CONGESTION_CONTROL)?;
        let gateway = format!("addr add {GATEWAY}/32 dev {port}\n");
        tool("ip", &["-n", router, "-batch", "-"], &gateway)?;
        self.switch_host(host, true)?;
        shape(namespace, "eth0", up_mbit)?;
        shape(router, port, down_mbit)
    }

    fn namespaces(&self) -> impl Iterator<Item = String> {
        let hosts = self.hosts.iter().chain([&self.registry]).map(|host| host.namespace.clone());
        let zones = (1..=self.zones.len()).map(|at| self.router(&format!("zone{at}")));
        hosts.chain(zones).chain([self.router("backbone")])
    }
}

/// A namespace that passes packets on.
fn make_router(namespace: &str) -> Result<(), Failure> {
    tool("ip", &["netns", "add", namespace], "")?;
    set(namespace, "ip_forward", "1")
}

/// Sets one of the kernel's parameters of IPv4 for a namespace.
fn set(namespace: &str, parameter: &str, value: &str) -> Result<(), Failure> {
    let enter = format!("--net={NAMESPACES}/{namespace}");
    let write = format!("echo {value} > /proc/sys/net/ipv4/{parameter}");
    tool("nsenter", &[enter.as_str(), "--", "sh", "-c", &write], "").map(drop)
}

impl Drop for Network {
    fn drop(&mut self) {
        for namespace in self.namespaces() {
            remove(&namespace);
        }
    }
}

/// Limits what `namespace` sends over `device`.
pub(crate) fn shape(namespace: &str, device: &str, mbit: f64) -> Result<(), Failure> {
    if mbit.is_infinite() {
        return Ok(());
    }
    let (rate, burst) = (format!("{:.0}kbit", mbit * 1000.0), (mbit * 125.0 * BURST_MS).max(MIN_BURST));
    let burst = format!("{burst:.0}");
    let arguments = ["-n", namespace, "qdisc", "add", "dev", device, "root", "tbf"];
    tool("tc", &[&arguments[..], &["rate", &rate, "burst", &burst, "latency", QUEUE]].concat(), "").map(drop)
}

/// Namespaces of a run that was killed.
fn remove_stale() {
    let entries = fs::read_dir(NAMESPACES).into_iter().flatten().flatten();
    for name in entries.filter_map(|entry| entry.file_name().into_string().ok()) {
        let owner = name.strip_prefix("shoal-").and_then(|rest| rest.split_once('-'));
        let stale = |pid: &str| pid.parse::<u32>().is_ok() && !Path::new("/proc").join(pid).exists();
        if owner.is_some_and(|(pid, _)| stale(pid)) {
            remove(&name);
        }
    }
}

pub(crate) fn remove(namespace: &str) {
    if Path::new(NAMESPACES).join(namespace).exists()
        && let Err(error) = tool("ip", &["netns", "delete", namespace], "")
    {
        eprintln!("cluster: {error}");
    }
}
