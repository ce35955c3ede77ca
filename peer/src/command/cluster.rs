//! `shoal cluster`: the operator's side of admission. Makes the cluster's key, and signs who may join with it.

use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use clap::Subcommand;
use humantime_serde::re::humantime;
use shoal_proto::PeerId;

use super::{Failure, ctl, runtime};
use crate::{
    api,
    config::Role,
    identity::{self, Identity},
    membership::{Certificate, ClusterKey, unix_now},
};

#[derive(Debug, Subcommand)]
pub(super) enum Cluster {
    /// Make the cluster's key; prints the public key, which goes into every node's configuration.
    Init {
        /// Folder for the key. Whoever can read it decides who joins: keep it off the nodes.
        dir: PathBuf,
    },
    /// Sign a certificate of membership for a node.
    Issue(Issue),
    /// Print what a certificate of membership says.
    Show {
        /// The certificate.
        file: PathBuf,
    },
    /// Take back every certificate issued to a node until now.
    Revoke(Revoke),
}

#[derive(Debug, clap::Args)]
pub(super) struct Issue {
    /// Folder with the cluster's key.
    #[arg(long, value_name = "DIR")]
    cluster: PathBuf,
    /// The node, as `shoal identity` prints it there.
    #[arg(long, value_name = "ID", conflicts_with = "data_dir", required_unless_present = "data_dir")]
    peer: Option<String>,
    /// The node whose data directory this is; its identity is made if it has none, and the certificate put there.
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// What the node may do for the others.
    #[arg(long, value_name = "node|seed", default_value = "node", value_parser = parse_role)]
    role: Role,
    /// Where the node is.
    #[arg(long, default_value = "default")]
    zone: String,
    /// How long the certificate is valid, for instance 90d or 12h; at most 400 days.
    #[arg(long, value_name = "TIME", default_value = "90d", value_parser = humantime::parse_duration)]
    valid: Duration,
    /// Where to write the certificate. Default: `membership` in the data directory.
    #[arg(long, value_name = "FILE", required_unless_present = "data_dir")]
    out: Option<PathBuf>,
}

#[derive(Debug, clap::Args)]
pub(super) struct Revoke {
    /// Folder with the cluster's key.
    #[arg(long, value_name = "DIR")]
    cluster: PathBuf,
    /// The node, as `shoal ctl peers` prints it.
    #[arg(value_name = "ID")]
    peer: String,
    /// Write the revocation there, for `shoal ctl revoke` on any node.
    #[arg(long, value_name = "FILE", required_unless_present = "socket")]
    out: Option<PathBuf>,
    /// Hand it to the daemon with this socket, which tells all others.
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
}

fn parse_role(text: &str) -> Result<Role, String> {
    match text {
        "node" => Ok(Role::Node),
        "seed" => Ok(Role::Seed),
        _ => Err("expected node or seed".to_owned()),
    }
}

impl Cluster {
    pub(super) fn run(self) -> Result<ExitCode, Failure> {
        match self {
            Self::Init { dir } => println!("public_key = \"{}\"", ClusterKey::create(&dir)?.public_key()),
            Self::Issue(issue) => issue.run()?,
            Self::Show { file } => show(&file)?,
            Self::Revoke(revoke) => revoke.run()?,
        }
        Ok(ExitCode::SUCCESS)
    }
}

impl Issue {
    fn run(self) -> Result<(), Failure> {
        let key = ClusterKey::load(&self.cluster)?;
        let (peer, default) = self.node()?;
        let out = self.out.or(default).ok_or("--out is missing")?;
        let seconds = self.valid.as_secs();
        let (certificate, shown) = key.issue(peer, self.role.into(), &self.zone, unix_now(), seconds)?;
        replace(&out, &shown)?;
        print(&certificate);
        Ok(())
    }

    /// The node, and where its certificate is looked for.
    fn node(&self) -> Result<(PeerId, Option<PathBuf>), Failure> {
        match (&self.peer, &self.data_dir) {
            (Some(peer), _) => Ok((identity::from_text(peer)?, None)),
            (None, Some(dir)) => {
                fs::create_dir_all(dir)?;
                Ok((Identity::load_or_create(dir)?.peer(), Some(dir.join("membership"))))
            }
            (None, None) => Err("--peer or --data-dir is missing".into()),
        }
    }
}

impl Revoke {
    fn run(self) -> Result<(), Failure> {
        let peer = identity::from_text(&self.peer)?;
        let signed = ClusterKey::load(&self.cluster)?.revoke(peer, unix_now())?;
        if let Some(out) = &self.out {
            replace(out, &signed)?;
        }
        match &self.socket {
            Some(socket) => {
                runtime()?.block_on(async { ctl::revoke(api::connect(socket).await?, signed.to_vec()).await })
            }
            None => Ok(()),
        }
    }
}

fn show(file: &Path) -> Result<(), Failure> {
    let shown = fs::read(file).map_err(|error| format!("cannot read {}: {error}", file.display()))?;
    let certificate = Certificate::read(&shown).map_err(|refusal| format!("{}: {refusal}", file.display()))?;
    print(&certificate);
    Ok(())
}

fn print(certificate: &Certificate) {
    let Certificate { peer, role, zone, expires, .. } = certificate;
    let left = Duration::from_secs(expires.saturating_sub(unix_now()));
    let left =
        if left.is_zero() { "expired".to_owned() } else { format!("for {}", humantime::format_duration(left)) };
    println!("{} {role} zone {zone} {left}", identity::to_text(peer));
}

/// Puts a file in place as a whole, since a daemon may be about to read it.
fn replace(path: &Path, contents: &[u8]) -> Result<(), Failure> {
    let failed = |error: std::io::Error| format!("cannot write {}: {error}", path.display());
    let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut file = tempfile::NamedTempFile::new_in(dir).map_err(failed)?;
    file.write_all(contents).map_err(failed)?;
    file.as_file().sync_all().map_err(failed)?;
    file.persist(path).map_err(|error| failed(error.error))?;
    Ok(())
}
