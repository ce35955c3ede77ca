//! A registry at the other end of a link of a certain rate: in a network namespace of its own, with one link to this host.

use std::{
    net::{Ipv4Addr, SocketAddr},
    path::Path,
    process::Command,
};

use shoal::command::Failure;

use crate::cluster::{NAMESPACES, remove, shape, tool};

/// This host's end. Addresses of this kind are for one link only, so nobody else has them on another.
const HERE: &str = "169.254.77.1";
/// The registry's end.
const THERE: Ipv4Addr = Ipv4Addr::new(169, 254, 77, 2);

/// Dropping it takes the link away.
#[derive(Debug)]
pub(super) struct Link {
    namespace: String,
}

impl Link {
    /// # Errors
    /// Needs `ip`, `tc` and root.
    pub(super) fn new(mbit: f64) -> Result<Self, Failure> {
        let pid = std::process::id();
        // As those of clusters are called, so that what a killed run leaves is found.
        let namespace = format!("shoal-{pid}-link");
        tool("ip", &["netns", "add", &namespace], "")?;
        let link = Self { namespace };
        let (namespace, device) = (&link.namespace, format!("shoal{pid}"));
        let here = format!(
            "link add {device} type veth peer name eth0 netns {namespace}\naddr add {HERE}/30 dev {device}\nlink set {device} up\n"
        );
        tool("ip", &["-batch", "-"], &here)?;
        let there = format!("addr add {THERE}/30 dev eth0\nlink set lo up\nlink set eth0 up\n");
        tool("ip", &["-n", namespace, "-batch", "-"], &there)?;
        shape(namespace, "eth0", mbit)?;
        Ok(link)
    }

    /// Where the registry listens, at any port that is free.
    pub(super) fn address(&self) -> SocketAddr {
        (THERE, 0).into()
    }

    /// A command that runs `program` at the other end.
    pub(super) fn command(&self, program: &Path) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={NAMESPACES}/{}", self.namespace)).arg("--").arg(program);
        command
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        remove(&self.namespace);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::check_tools;

    #[test]
    fn what_comes_from_the_other_end_is_held_to_the_rate() {
        if let Err(missing) = check_tools() {
            println!("skipped: a link of a certain rate ({missing})");
            return;
        }
        let link = Link::new(400.0).expect("a link");
        let said = |arguments: &[&str]| {
            let output = tool(arguments[0], &arguments[1..], "").expect("it succeeds");
            String::from_utf8(output).expect("text")
        };
        let shaped = said(&["tc", "-n", &link.namespace, "qdisc", "show", "dev", "eth0"]);
        assert!(shaped.contains("tbf") && shaped.contains("rate 400Mbit"), "{shaped}");
        let there = THERE.to_string();
        assert!(said(&["ip", "route", "get", &there]).contains(&format!("dev shoal{}", std::process::id())));
        let own = link.command("ip".as_ref()).args(["-o", "address"]).output().expect("it runs");
        assert!(String::from_utf8_lossy(&own.stdout).contains(&there));
        let namespace = Path::new(NAMESPACES).join(&link.namespace);
        assert!(namespace.exists());
        drop(link);
        assert!(!namespace.exists());
    }
}
