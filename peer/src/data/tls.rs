//! Mutual TLS 1.3 whose certificates prove libp2p identities, so that a peer here is the same peer as on the control
//! plane (libp2p TLS specification: a self-signed certificate with the identity's signature over its key).
//!
//! The certificate format is `libp2p-tls`'s. Its ready-made configurations are not used: they speak for libp2p's own
//! protocol and prefer ChaCha20, which costs a server with AES instructions twice the time.
//!
//! A certificate says who a peer is and not whether it may join; that is the hello's part.

use std::sync::Arc;

use libp2p::identity::Keypair;
use libp2p_tls::certificate::{self, GenError};
use quinn::crypto::rustls::{NoInitialCipherSuite, QuicClientConfig, QuicServerConfig};
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, SignatureScheme,
    client::{
        Resumption,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::{CryptoProvider, aws_lc_rs},
    pki_types::{CertificateDer, ServerName, UnixTime},
    server::danger::{ClientCertVerified, ClientCertVerifier},
    sign::{CertifiedKey, SingleCertAndKey},
};
use shoal_proto::PeerId;

use crate::identity;

/// What both sides must name in the handshake. The protocol's version is settled in the hello.
pub(super) const ALPN: &[u8] = b"shoal/1";
/// The name that a client sends; nobody looks at it.
pub(super) const SERVER_NAME: &str = "shoal";

/// Why there is no TLS configuration.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// The certificate could not be made.
    #[error("cannot make a certificate")]
    Certificate(#[from] GenError),
    /// The key, cipher suites or versions do not fit together.
    #[error("cannot configure TLS")]
    Rustls(#[from] rustls::Error),
    /// The provider lacks the cipher that QUIC starts with.
    #[error("cannot configure QUIC")]
    Quic(#[from] NoInitialCipherSuite),
}

/// The two sides' configurations, showing one certificate made now for `keypair`.
pub(super) fn configure(keypair: &Keypair) -> Result<(QuicClientConfig, QuicServerConfig), TlsError> {
    let (certificate, key) = certificate::generate(keypair)?;
    let key = aws_lc_rs::sign::any_ecdsa_type(&key)?;
    let shown = Arc::new(SingleCertAndKey::from(CertifiedKey::new(vec![certificate], key)));
    let provider = Arc::new(provider());

    let mut client = rustls::ClientConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Libp2pVerifier))
        .with_client_cert_resolver(shown.clone());
    client.alpn_protocols = vec![ALPN.to_vec()];
    client.resumption = Resumption::disabled();

    let mut server = rustls::ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(Arc::new(Libp2pVerifier))
        .with_cert_resolver(shown);
    server.alpn_protocols = vec![ALPN.to_vec()];
    server.send_tls13_tickets = 0;
    Ok((client.try_into()?, server.try_into()?))
}

/// The peer at the other end; `None` if its certificate names no ed25519 identity.
pub(super) fn peer_of(connection: &quinn::Connection) -> Option<PeerId> {
    let shown = connection.peer_identity()?.downcast::<Vec<CertificateDer<'static>>>().ok()?;
    let parsed = certificate::parse(shown.first()?).ok()?;
    identity::from_libp2p(&parsed.peer_id()).ok()
}

/// AWS-LC, a fifth faster than ring here, with AES-128 first: the same strength as the identity's keys, and the fastest on servers.
fn provider() -> CryptoProvider {
    use aws_lc_rs::cipher_suite::{
        TLS13_AES_128_GCM_SHA256, TLS13_AES_256_GCM_SHA384, TLS13_CHACHA20_POLY1305_SHA256,
    };
    CryptoProvider {
        cipher_suites: vec![TLS13_AES_128_GCM_SHA256, TLS13_AES_256_GCM_SHA384, TLS13_CHACHA20_POLY1305_SHA256],
        ..aws_lc_rs::default_provider()
    }
}

/// Accepts exactly one self-signed certificate that carries a valid proof of a libp2p identity.
#[derive(Debug)]
struct Libp2pVerifier;

impl Libp2pVerifier {
    fn check(end_entity: &CertificateDer<'_>, intermediates: &[CertificateDer<'_>]) -> Result<(), rustls::Error> {
        if !intermediates.is_empty() {
            return Err(rustls::Error::InvalidCertificate(CertificateError::BadEncoding));
        }
        certificate::parse(end_entity)?;
        Ok(())
    }

    fn check_signature(
        message: &[u8],
        cert: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        certificate::parse(cert)?.verify_signature(signed.scheme, message, signed.signature())?;
        Ok(HandshakeSignatureValid::assertion())
    }

    fn schemes() -> Vec<SignatureScheme> {
        vec![SignatureScheme::ECDSA_NISTP256_SHA256, SignatureScheme::ECDSA_NISTP384_SHA384, SignatureScheme::ED25519]
    }

    fn tls12() -> rustls::Error {
        rustls::Error::General("TLS 1.2 is not spoken".into())
    }
}

impl ServerCertVerifier for Libp2pVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Self::check(end_entity, intermediates).map(|()| ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(Self::tls12())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Self::check_signature(message, cert, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        Self::schemes()
    }
}

impl ClientCertVerifier for Libp2pVerifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        Self::check(end_entity, intermediates).map(|()| ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(Self::tls12())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Self::check_signature(message, cert, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        Self::schemes()
    }
}
