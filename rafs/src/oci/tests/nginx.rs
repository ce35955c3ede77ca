//! How nginx is started as a place of blobs. Only the standard library, so that the daemon's tests use it as well.

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
};

/// What is below `/private/` the user `user` with the password `secret` may read and write, all else anybody; all of it lies in the folder
/// `root` in `folder`, where the log of what was asked is `access.log`. `None` where it is not installed.
pub(crate) fn command(folder: &Path, address: &str) -> Option<Command> {
    let runs = |program: &&str| Command::new(program).arg("-v").stderr(Stdio::null()).status().is_ok();
    let program = ["nginx", "/usr/sbin/nginx"].into_iter().find(runs)?;
    let place = folder.display();
    fs::create_dir_all(folder.join("root/blobs")).unwrap();
    fs::write(folder.join("htpasswd"), "user:{PLAIN}secret\n").unwrap();
    let temporary = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
        .map(|kind| format!("{kind}_temp_path {place}/{kind};\n"))
        .concat();
    let config = format!(
        "daemon off;\nmaster_process off;\npid {place}/pid;\nerror_log {place}/error.log;\n\
         events {{ worker_connections 64; }}\n\
         http {{ access_log {place}/access.log; client_max_body_size 0;\n{temporary}\
         server {{ listen {address}; root {place}/root; dav_methods PUT; create_full_put_path on;\n\
         location /private/ {{ auth_basic here; auth_basic_user_file {place}/htpasswd; }} }} }}\n"
    );
    fs::write(folder.join("nginx.conf"), config).unwrap();
    let mut command = Command::new(program);
    command.arg("-p").arg(folder).arg("-e").arg(folder.join("error.log")).arg("-c").arg(folder.join("nginx.conf"));
    command.stdout(Stdio::null()).stderr(Stdio::null());
    Some(command)
}
