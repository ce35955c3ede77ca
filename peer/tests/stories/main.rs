//! The stories of the daemon's users, end to end: real processes, sockets, mounts and files, and a registry of the test's
//! own. One program, because each one would link libp2p and RocksDB again.

mod support;

mod admission;
mod batch_image;
mod blob_backend;
mod converted;
mod credential_helpers;
mod credentials;
mod crowd;
mod demo;
mod disputed_blob;
mod encrypted_images;
mod every_mode;
mod forgotten_images;
mod full_disk;
mod gzip_layers;
mod hostile_peers;
mod kept_mounts;
mod kills;
mod lazy_mounts;
mod limits;
mod many_files;
mod mirror;
mod modes;
mod native_mounts;
mod next_version;
mod nydus_image;
mod one_owner;
mod prefetch_table;
mod preheat;
mod preheat_words;
mod pull_secrets;
mod read_ahead;
mod registry_down;
mod registry_proxy;
mod registry_server;
mod resume_after_kill;
mod start_traces;
mod store_killed;
mod store_limit;
mod store_scrub;
mod tarfs;
mod upgrade;
mod upstream_images;
mod wrong_bytes;
