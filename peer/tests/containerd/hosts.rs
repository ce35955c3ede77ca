//! Hosts: network namespaces that hang on one bridge, which is in a namespace of its own. Nothing of it is seen from
//! outside, so tests do not get into each other's way. The file systems are everyone's.

use std::{
    net::Ipv4Addr,
    path::Path,
    process::{Command, Output},
    sync::atomic::{AtomicU32, Ordering::Relaxed},
};

/// Where `ip netns` keeps the namespaces.
const NAMESPACES: &str = "/run/netns";
/// Beds of this process so far.
static BEDS: AtomicU32 = AtomicU32::new(0);

/// Dropping it takes the namespaces away.
pub(crate) struct Hosts {
    prefix: String,
    count: u8,
}

impl Hosts {
    /// None, with a line that says why, where namespaces cannot be made.
    pub(crate) fn new(test: &str, count: u8) -> Option<Self> {
        if let Some(missing) = ["ip", "nsenter"].iter().find(|tool| Command::new(tool).arg("-V").output().is_err()) {
            println!("skipped: {test} (needs {missing})");
            return None;
        }
        let hosts =
            Self { prefix: format!("shoal-test-{}-{}-", std::process::id(), BEDS.fetch_add(1, Relaxed)), count };
        let made = ip(&["netns", "add", &hosts.namespace(0)]);
        if !made.status.success() {
            println!("skipped: {test} (needs network namespaces)");
            return None;
        }
        let hub = hosts.namespace(0);
        let in_hub = |arguments: &[&str]| done(&[&["-n", &hub], arguments].concat());
        in_hub(&["link", "set", "lo", "up"]);
        in_hub(&["link", "add", "bridge", "type", "bridge"]);
        in_hub(&["address", "add", &format!("{}/24", hosts.address(0)), "dev", "bridge"]);
        in_hub(&["link", "set", "bridge", "up"]);
        for n in 1..=count {
            let (namespace, port) = (hosts.namespace(n), format!("port{n}"));
            done(&["netns", "add", &namespace]);
            in_hub(&["link", "add", &port, "type", "veth", "peer", "name", "eth0", "netns", &namespace]);
            in_hub(&["link", "set", &port, "master", "bridge", "up"]);
            let address = format!("{}/24", hosts.address(n));
            for arguments in [
                &["link", "set", "lo", "up"][..],
                &["address", "add", &address, "dev", "eth0"],
                &["link", "set", "eth0", "up"],
            ] {
                done(&[&["-n", &namespace], arguments].concat());
            }
        }
        Some(hosts)
    }

    /// Host 0 is where the bridge is.
    pub(crate) fn address(&self, host: u8) -> Ipv4Addr {
        Ipv4Addr::new(10, 79, 0, host + 1)
    }

    /// A command that runs `program` on this host, in the same process.
    pub(crate) fn command(&self, host: u8, program: impl AsRef<Path>) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={NAMESPACES}/{}", self.namespace(host))).arg("--").arg(program.as_ref());
        command
    }

    /// What the host is called, and nothing else is.
    pub(crate) fn namespace(&self, host: u8) -> String {
        format!("{}{host}", self.prefix)
    }
}

impl Drop for Hosts {
    fn drop(&mut self) {
        for host in 0..=self.count {
            // With it go its links.
            let _ = ip(&["netns", "del", &self.namespace(host)]);
        }
    }
}

fn ip(arguments: &[&str]) -> Output {
    Command::new("ip").args(arguments).output().expect("ip runs")
}

fn done(arguments: &[&str]) {
    let output = ip(arguments);
    assert!(output.status.success(), "ip {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}
