//! Where credentials are when nobody says it: the files that podman and skopeo read, in their order.

use std::{
    ffi::OsString,
    path::{Path, PathBuf},
};

use shoal_rafs::oci::{Authfile, AuthfileError};

/// What `$REGISTRY_AUTH_FILE` names, else the files that are there of those that tools write. The first that has something for a
/// registry counts.
///
/// # Errors
/// One that is there and cannot be used.
pub(super) fn load(variable: impl Fn(&str) -> Option<OsString>) -> Result<Authfile, AuthfileError> {
    let set = |name: &str| variable(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    if let Some(file) = set("REGISTRY_AUTH_FILE") {
        return Authfile::load(&file);
    }
    let mut all = Authfile::default();
    for (file, entries_alone) in places(set).into_iter().filter(|(file, _)| file.exists()) {
        all = all.before(if entries_alone { Authfile::load_entries(&file)? } else { Authfile::load(&file)? });
    }
    Ok(all)
}

/// Each with whether it is of docker's old form.
fn places(set: impl Fn(&str) -> Option<PathBuf>) -> Vec<(PathBuf, bool)> {
    const CONTAINERS: &str = "containers/auth.json";
    let home = set("HOME");
    let below_home = |path: &str| home.as_ref().map(|home| home.join(path));
    let run = || Path::new("/run/containers").join(rustix::process::geteuid().as_raw().to_string());
    let runtime = match set("XDG_RUNTIME_DIR") {
        Some(dir) => dir.join(CONTAINERS),
        None => run().join("auth.json"),
    };
    let config = set("XDG_CONFIG_HOME").or_else(|| below_home(".config")).map(|dir| dir.join(CONTAINERS));
    let docker = set("DOCKER_CONFIG").or_else(|| below_home(".docker")).map(|dir| dir.join("config.json"));
    let old = below_home(".dockercfg").map(|file| (file, true));
    [Some(runtime), config, docker].into_iter().flatten().map(|file| (file, false)).chain(old).collect()
}

#[cfg(test)]
mod tests {
    use shoal_rafs::oci::Source;

    use super::*;

    #[test]
    fn files_are_looked_for_where_podman_does() {
        let dir = tempfile::tempdir().unwrap();
        let of = |name: &str| dir.path().join(name);
        let write = |path: &str, text: &str| {
            std::fs::create_dir_all(of(path).parent().unwrap()).unwrap();
            std::fs::write(of(path), text).unwrap();
        };
        let entry = |user: &str| format!(r#"{{"username": "{user}", "password": "secret"}}"#);
        let file = |registry: &str, user: &str| format!(r#"{{"auths": {{"{registry}": {}}}}}"#, entry(user));
        let user = |variables: &[(&str, &str)], registry: &str| {
            let variable = |name: &str| match name {
                "HOME" => Some(of("home").into_os_string()),
                "XDG_RUNTIME_DIR" => Some(of("run").into_os_string()),
                _ => variables.iter().find(|(known, _)| *known == name).map(|(_, path)| of(path).into_os_string()),
            };
            let found = load(variable).unwrap();
            found.find(&Source::new(registry, "app").unwrap()).map(|found| found.username.clone())
        };
        assert_eq!(user(&[], "h.io"), None);
        write("home/.dockercfg", &format!(r#"{{"old.io": {}}}"#, entry("old")));
        write("home/.docker/config.json", &file("h.io", "docker"));
        assert_eq!(user(&[], "h.io").as_deref(), Some("docker"));
        assert_eq!(user(&[], "old.io").as_deref(), Some("old"));
        write("home/.config/containers/auth.json", &file("h.io", "config"));
        assert_eq!(user(&[], "h.io").as_deref(), Some("config"));
        write("run/containers/auth.json", &file("i.io", "run"));
        assert_eq!(user(&[], "h.io").as_deref(), Some("config"));
        assert_eq!(user(&[], "i.io").as_deref(), Some("run"));
        write("other/config.json", &file("j.io", "other"));
        assert_eq!(user(&[("DOCKER_CONFIG", "other")], "j.io").as_deref(), Some("other"));
        write("named.json", &file("h.io", "named"));
        let named = [("REGISTRY_AUTH_FILE", "named.json")];
        assert_eq!((user(&named, "h.io").as_deref(), user(&named, "i.io")), (Some("named"), None));
        // One that is there and broken is told.
        write("run/containers/auth.json", "{");
        let variable = |name: &str| (name == "XDG_RUNTIME_DIR").then(|| of("run").into_os_string());
        assert!(load(variable).unwrap_err().to_string().contains("run/containers/auth.json"));
    }
}
