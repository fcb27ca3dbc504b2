//! TLS by libpq's `sslmode`.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, aws_lc_rs, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{CertificateError, ClientConfig, DigitallySignedStruct, Error, RootCertStore, SignatureScheme};
use tokio_postgres::config::SslMode;
use tokio_postgres_rustls::MakeRustlsConnect;
use wallaby_connector_api::SinkError;

/// What is asked of the server's certificate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verify {
    /// Nothing: the channel is encrypted, the peer unknown.
    Nothing,
    /// A trusted authority, for whatever host.
    Authority,
    /// A trusted authority, for this host.
    Host,
}

/// The TLS settings of a dsn.
#[derive(Clone, Debug)]
pub(crate) struct Tls {
    pub mode: SslMode,
    pub verify: Verify,
    pub root: Option<String>,
    pub certificate: Option<PathBuf>,
    pub key: Option<PathBuf>,
}

impl Default for Tls {
    fn default() -> Self {
        Tls { mode: SslMode::Prefer, verify: Verify::Nothing, root: None, certificate: None, key: None }
    }
}

impl Tls {
    /// How tokio-postgres asks for TLS.
    pub(crate) fn transport_mode(&self) -> SslMode {
        self.mode
    }

    /// The connector. Reads the certificate files.
    pub(crate) fn connector(&self) -> Result<MakeRustlsConnect, SinkError> {
        let provider = Arc::new(aws_lc_rs::default_provider());
        let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .map_err(|error| failed(error.to_string()))?;
        // As libpq does: a root certificate that is given is used, also where sslmode alone would not ask for one.
        let chain = self.root.is_some() || self.verify != Verify::Nothing;
        let builder = if self.verify == Verify::Host {
            builder.with_root_certificates(self.roots()?)
        } else {
            let authority = if chain {
                let roots = Arc::new(self.roots()?);
                let verifier = WebPkiServerVerifier::builder_with_provider(roots, Arc::clone(&provider)).build();
                Some(verifier.map_err(|error| failed(format!("sslrootcert: {error}")))?)
            } else {
                None
            };
            builder.dangerous().with_custom_certificate_verifier(Arc::new(LenientVerifier { authority, provider }))
        };
        let client = match (&self.certificate, &self.key) {
            (Some(certificate), Some(key)) => {
                let chain = certificates(certificate).map_err(|reason| failed(format!("sslcert: {reason}")))?;
                let key = PrivateKeyDer::from_pem_file(key).map_err(|error| failed(format!("sslkey: {error}")))?;
                builder.with_client_auth_cert(chain, key).map_err(|error| failed(format!("sslcert: {error}")))?
            }
            (None, None) => builder.with_no_client_auth(),
            _ => return Err(failed("sslcert and sslkey go together".to_owned())),
        };
        Ok(MakeRustlsConnect::new(client))
    }

    fn roots(&self) -> Result<RootCertStore, SinkError> {
        let mut store = RootCertStore::empty();
        match self.root.as_deref() {
            None | Some("system") => {
                store.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
            }
            Some(path) => {
                let found = certificates(Path::new(path)).map_err(|reason| failed(format!("sslrootcert: {reason}")))?;
                for certificate in found {
                    store.add(certificate).map_err(|error| failed(format!("sslrootcert: {error}")))?;
                }
            }
        }
        if store.is_empty() {
            return Err(failed("sslrootcert: no trusted certificate was found".to_owned()));
        }
        Ok(store)
    }
}

fn failed(reason: String) -> SinkError {
    SinkError::Configuration {
        reason: format!("the sink's TLS settings do not work: {reason}"),
        remedy: "Correct sslmode, sslrootcert, sslcert or sslkey in the sink's dsn".to_owned(),
    }
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let chain: Result<Vec<_>, _> = CertificateDer::pem_file_iter(path).map_err(|error| error.to_string())?.collect();
    chain.map_err(|error| error.to_string())
}

/// The checks that `sslmode` leaves out; signatures of the handshake are always verified.
#[derive(Debug)]
struct LenientVerifier {
    authority: Option<Arc<WebPkiServerVerifier>>,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for LenientVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let Some(verifier) = &self.authority else { return Ok(ServerCertVerified::assertion()) };
        // The chain is verified before the name, so a wrong name means a right chain.
        match verifier.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now) {
            Err(Error::InvalidCertificate(
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
            )) => Ok(ServerCertVerified::assertion()),
            verdict => verdict,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
