//! TLS by libpq's `sslmode`, and what SCRAM needs of the server's certificate.
//!
//! One set of rules for both connections: the control connection runs over a transport that was made here.

use std::path::Path;
use std::sync::Arc;

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, aws_lc_rs, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{CertificateError, ClientConfig, DigitallySignedStruct, Error, RootCertStore, SignatureScheme};
use sha2::{Digest, Sha256, Sha384, Sha512};
use x509_parser::prelude::FromDer;
use x509_parser::signature_algorithm::SignatureAlgorithm;

use crate::config::{ConnectConfig, RootCert, SslMode};
use crate::error::SourceError;

/// What is asked of the server's certificate.
#[derive(Debug)]
enum Trust {
    /// Any certificate: the channel is encrypted, the peer unknown.
    Anybody,
    /// One of a trusted authority, for whatever host.
    Authority(Arc<WebPkiServerVerifier>),
}

/// The checks that `sslmode` leaves out; signatures of the handshake are always verified.
#[derive(Debug)]
struct LenientVerifier {
    trust: Trust,
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
        let Trust::Authority(verifier) = &self.trust else {
            return Ok(ServerCertVerified::assertion());
        };
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

/// The client's TLS settings for a connection; reads the certificate files, so it may block for a moment.
pub(crate) fn client_config(config: &ConnectConfig) -> Result<Arc<ClientConfig>, SourceError> {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let failed = |reason: String| SourceError::Tls { target: config.target(), reason };
    let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .map_err(|error| failed(error.to_string()))?;
    // As libpq does: a root certificate that is given is used, also where sslmode alone would not ask for one.
    let verify_chain = config.sslrootcert.is_some() || config.sslmode >= SslMode::VerifyCa;
    let builder = if config.sslmode == SslMode::VerifyFull {
        builder.with_root_certificates(roots(config)?)
    } else {
        let trust = if verify_chain {
            let verifier =
                WebPkiServerVerifier::builder_with_provider(Arc::new(roots(config)?), Arc::clone(&provider)).build();
            Trust::Authority(verifier.map_err(|error| failed(format!("sslrootcert: {error}")))?)
        } else {
            Trust::Anybody
        };
        builder.dangerous().with_custom_certificate_verifier(Arc::new(LenientVerifier { trust, provider }))
    };
    let client = match (&config.sslcert, &config.sslkey) {
        (Some(cert), Some(key)) => {
            let chain = certificates(cert).map_err(|reason| failed(format!("sslcert: {reason}")))?;
            let key = PrivateKeyDer::from_pem_file(key).map_err(|error| failed(format!("sslkey: {error}")))?;
            builder.with_client_auth_cert(chain, key).map_err(|error| failed(format!("sslcert: {error}")))?
        }
        _ => builder.with_no_client_auth(),
    };
    Ok(Arc::new(client))
}

fn roots(config: &ConnectConfig) -> Result<RootCertStore, SourceError> {
    let failed = |reason: String| SourceError::Tls { target: config.target(), reason };
    let mut store = RootCertStore::empty();
    match &config.sslrootcert {
        Some(RootCert::File(path)) => {
            for certificate in certificates(path).map_err(|reason| failed(format!("sslrootcert: {reason}")))? {
                store.add(certificate).map_err(|error| failed(format!("sslrootcert: {error}")))?;
            }
        }
        Some(RootCert::System) | None => {
            store.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        }
    }
    if store.is_empty() {
        return Err(failed("sslrootcert: no trusted certificate was found".into()));
    }
    Ok(store)
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let chain: Result<Vec<_>, _> = CertificateDer::pem_file_iter(path).map_err(|error| error.to_string())?.collect();
    match chain {
        Ok(chain) if chain.is_empty() => Err("the file holds no certificate".into()),
        Ok(chain) => Ok(chain),
        Err(error) => Err(error.to_string()),
    }
}

/// RFC 5929's `tls-server-end-point`: the certificate hashed with its signature's hash, MD5 and SHA-1 lifted to SHA-256.
/// `None` when the signature has no hash of its own (Ed25519), for which the RFC defines nothing.
pub(crate) fn server_end_point(certificate: &[u8]) -> Option<Vec<u8>> {
    const SHA384: &str = "2.16.840.1.101.3.4.2.2";
    const SHA512: &str = "2.16.840.1.101.3.4.2.3";
    let (_, parsed) = x509_parser::certificate::X509Certificate::from_der(certificate).ok()?;
    let algorithm = &parsed.signature_algorithm;
    let hash = match algorithm.algorithm.to_id_string().as_str() {
        // RSA or ECDSA with SHA-384, with SHA-512.
        "1.2.840.113549.1.1.12" | "1.2.840.10045.4.3.3" => SHA384.to_owned(),
        "1.2.840.113549.1.1.13" | "1.2.840.10045.4.3.4" => SHA512.to_owned(),
        // RSA with MD5, SHA-1, SHA-256; ECDSA with SHA-1, SHA-256.
        "1.2.840.113549.1.1.4"
        | "1.2.840.113549.1.1.5"
        | "1.2.840.113549.1.1.11"
        | "1.2.840.10045.4.1"
        | "1.2.840.10045.4.3.2" => String::new(),
        "1.2.840.113549.1.1.10" => match SignatureAlgorithm::try_from(algorithm).ok()? {
            SignatureAlgorithm::RSASSA_PSS(params) => params.hash_algorithm_oid().to_id_string(),
            _ => return None,
        },
        _ => return None,
    };
    Some(match hash.as_str() {
        SHA384 => Sha384::digest(certificate).to_vec(),
        SHA512 => Sha512::digest(certificate).to_vec(),
        _ => Sha256::digest(certificate).to_vec(),
    })
}
