//! Metrics and health over HTTP: `/metrics` (Prometheus), `/healthz` (the process answers) and `/readyz` (mounts of an
//! earlier run are back, so reads can be served).
//!
//! Every metric is described here, with its unit; the code that knows a figure sets it. Figures that the node keeps
//! anyway are copied when somebody asks, so that an unwatched daemon spends nothing on them.

use std::{net::SocketAddr, sync::Arc};

use axum::{Router, extract::State, http::StatusCode, routing::get};
use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle};
use tokio::{net::TcpListener, task::JoinHandle};

/// What the endpoint asks of the daemon.
pub trait Vitals: Send + Sync + 'static {
    /// Sets the gauges and counters to what they are now.
    fn export(&self);
    /// Whether the node serves all that it should.
    fn ready(&self) -> bool;
}

/// The running endpoint; dropping it leaves the server running, [`MetricsServer::stop`] ends it.
#[derive(Debug)]
pub struct MetricsServer {
    address: SocketAddr,
    task: JoinHandle<()>,
}

impl MetricsServer {
    /// Listens on `address` (port 0: any) and installs the process's metrics recorder.
    ///
    /// # Errors
    /// When the address cannot be bound.
    pub async fn start(address: SocketAddr, vitals: Arc<dyn Vitals>) -> std::io::Result<Self> {
        let listener = TcpListener::bind(address).await?;
        let address = listener.local_addr()?;
        let recorder = PrometheusBuilder::new().build_recorder();
        let handle = recorder.handle();
        // A second daemon in one process, as in tests, keeps the recorder of the first.
        let _ = metrics::set_global_recorder(recorder);
        describe();
        let router = Router::new()
            .route("/metrics", get(render))
            .route("/healthz", get(|| async { "ok\n" }))
            .route("/readyz", get(ready))
            .with_state(Endpoint { handle, vitals });
        let task = tokio::spawn(async move {
            if let Err(error) = axum::serve(listener, router).await {
                tracing::error!("the metrics endpoint ended: {error}");
            }
        });
        Ok(Self { address, task })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Ends it at once.
    pub fn stop(&self) {
        self.task.abort();
    }
}

#[derive(Clone)]
struct Endpoint {
    handle: PrometheusHandle,
    vitals: Arc<dyn Vitals>,
}

async fn render(State(endpoint): State<Endpoint>) -> String {
    endpoint.vitals.export();
    endpoint.handle.run_upkeep();
    endpoint.handle.render()
}

async fn ready(State(endpoint): State<Endpoint>) -> (StatusCode, &'static str) {
    if endpoint.vitals.ready() {
        (StatusCode::OK, "ready\n")
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "mounts of the last run are not back yet\n")
    }
}

fn describe() {
    use metrics::{Unit, describe_counter, describe_gauge};
    let origins = "by origin: local, peer, seed, registry";
    describe_counter!(
        "shoal_piece_bytes_total",
        Unit::Bytes,
        format!("Encoded bytes of pieces accepted or read from the store, {origins}.")
    );
    describe_counter!("shoal_chunks_total", Unit::Count, format!("Chunks in those pieces, {origins}."));
    describe_counter!(
        "shoal_object_bytes_total",
        Unit::Bytes,
        format!("Bytes of manifests and bootstraps, {origins}.")
    );
    describe_counter!("shoal_rejected_chunks_total", Unit::Count, "Chunks that did not match their digest.");
    describe_counter!("shoal_rejected_bytes_total", Unit::Bytes, "Encoded bytes of rejected chunks.");
    describe_counter!(
        "shoal_not_kept_total",
        Unit::Count,
        "Pieces and objects that were used and not kept, for want of room as a rule."
    );
    describe_counter!("shoal_served_bytes_total", Unit::Bytes, "Encoded bytes sent to other nodes.");
    let limits = "by limit: upload, upload_per_peer, download, registry, registry_requests";
    describe_gauge!(
        "shoal_limit_per_second",
        format!(
            "Bytes, or reads of the registry, that a limit lets through, 0 for all, {limits}, download_per_peer."
        )
    );
    describe_gauge!(
        "shoal_limit_wait_seconds",
        Unit::Seconds,
        format!("How long something waited for a limit since the start, {limits}.")
    );
    describe_counter!(
        "shoal_limit_delayed_total",
        format!("Bytes, or reads of the registry, that went on after they had waited for a limit, {limits}.")
    );
    describe_gauge!(
        "shoal_snapshots_set_aside",
        Unit::Count,
        "Snapshots whose records could not be read, or contradicted others, when the daemon started."
    );
    describe_gauge!(
        "shoal_known_blobs",
        Unit::Count,
        "Blobs of the images in memory, and objects that are being fetched: what the scheduler knows."
    );
    describe_gauge!("shoal_mounts", Unit::Count, "Mounted images.");
    describe_gauge!("shoal_mounts_kept", Unit::Count, "Those that outlive the daemon: native, or a keeper has them.");
    describe_gauge!("shoal_mounts_native", Unit::Count, "Those that the kernel serves by itself.");
    describe_gauge!("shoal_mounts_lazy", Unit::Count, "Native ones of which something is filled as it is read.");
    let modes = "by mode: fuse, lazy. Complete native mounts are read without the daemon";
    describe_counter!("shoal_reads_total", Unit::Count, format!("Reads of the kernel that were answered, {modes}."));
    describe_counter!("shoal_read_bytes_total", Unit::Bytes, format!("Bytes that they were about, {modes}."));
    describe_counter!("shoal_read_errors_total", Unit::Count, format!("Those that ended with an error, {modes}."));
    describe_counter!(
        "shoal_read_seconds_bucket",
        format!("How many of the others took less than `le` seconds; with `_sum` and `_count` a histogram, {modes}.")
    );
    describe_counter!(
        "shoal_read_fetched_bytes_total",
        Unit::Bytes,
        format!("Encoded bytes that nodes and the registry gave for these mounts, {modes}.")
    );
    describe_gauge!(
        "shoal_read_amplification",
        format!("Those by the bytes that were read, since the daemon started, {modes}.")
    );
    describe_counter!(
        "shoal_mounts_lost_total",
        Unit::Count,
        "Mounts that somebody else had unmounted or whose sessions had ended, and that were made again."
    );
    describe_counter!(
        "shoal_refused_connections_total",
        Unit::Count,
        "Data connections of others that were not let in, by reason: crowded, refused, violation, silent, other."
    );
    describe_counter!(
        "shoal_peer_faults_total",
        Unit::Count,
        "What other nodes did that they should not, by peer (64 are named) and fault: violation, wrong_bytes, stall, broken_promise, flood."
    );
    describe_gauge!(
        "shoal_start_traces",
        Unit::Count,
        "Starts of images that this seed peer has collected for others."
    );
    describe_gauge!("shoal_start_traces_bytes", Unit::Bytes, "Memory that they take up.");
    describe_counter!(
        "shoal_start_traces_heard_total",
        Unit::Count,
        "Starts that were told by other nodes, by whether they were taken in: taken."
    );
    describe_counter!(
        "shoal_prefetched_pieces_total",
        Unit::Count,
        "Pieces fetched after a mount before they were read, by reason: table, trace, rest."
    );
    describe_gauge!("shoal_connections", Unit::Count, "Open data connections to other nodes.");
    describe_gauge!(
        "shoal_membership_expires_seconds",
        Unit::Seconds,
        "When the node's certificate of membership expires, since 1970; 0 in an open cluster."
    );
    describe_gauge!("shoal_revocations", Unit::Count, "Revocations of memberships that are known.");
    describe_gauge!("shoal_store_bytes", Unit::Bytes, "Encoded bytes of the pieces in the store.");
    describe_gauge!("shoal_store_pieces", Unit::Count, "Pieces in the store.");
    describe_gauge!("shoal_store_disk_bytes", Unit::Bytes, "What blobs and objects take up on disk.");
    describe_gauge!("shoal_store_limit_bytes", Unit::Bytes, "Most that they may take up; 0 without a limit.");
    describe_gauge!("shoal_registry_proxy_used", "Whether the proxy of registries is asked at present: 1, else 0.");
    describe_counter!("shoal_registry_proxy_reads_total", Unit::Count, "Reads of registries that it was asked for.");
    describe_counter!(
        "shoal_registry_proxy_failed_reads_total",
        Unit::Count,
        "Those of them that it did not answer, or broke off."
    );
    describe_counter!("shoal_mirror_requests_total", Unit::Count, "Answers of the mirror, by status.");
    describe_counter!(
        "shoal_mirror_sent_bytes_total",
        Unit::Bytes,
        "Bytes of manifests and blobs that the mirror sent."
    );
    describe_counter!(
        "shoal_mirror_cut_answers_total",
        Unit::Count,
        "Answers of the mirror that were cut on their way."
    );
    describe_counter!(
        "shoal_mirror_access_checks_total",
        Unit::Count,
        "Times that a registry was asked what a client of the mirror may read."
    );
    describe_counter!(
        "shoal_refuted_lists_total",
        Unit::Count,
        "Hash lists of blobs, of other nodes, that turned out wrong."
    );
    describe_gauge!("shoal_pins", Unit::Count, "Pinned images.");
    describe_counter!("shoal_evicted_blobs_total", Unit::Count, "Blobs that were evicted.");
    describe_counter!("shoal_evicted_bytes_total", Unit::Bytes, "What evicted blobs and objects took up on disk.");
}
