//! TLS by libpq's `sslmode`.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, aws_lc_rs, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{CertificateError, ClientConfig, DigitallySignedStruct, Error, RootCertStore, SignatureScheme};

use crate::ConfigError;

/// How TLS is used; libpq's `sslmode`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Default)]
pub enum SslMode {
    /// Never.
    Disable,
    /// Only when the server refuses a connection without.
    Allow,
    /// When the server can. The default, as with libpq.
    #[default]
    Prefer,
    /// Always; the certificate is not looked at, unless `sslrootcert` is given.
    Require,
    /// Always, with a certificate of a trusted authority.
    VerifyCa,
    /// Always, with a certificate of a trusted authority for this very host.
    VerifyFull,
}

/// Trusted authorities; libpq's `sslrootcert`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RootCert {
    /// Those of the platform (`sslrootcert=system`).
    System,
    /// A PEM file.
    File(PathBuf),
}

/// What a connection string says of TLS.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct TlsSettings {
    /// How it is used.
    pub mode: SslMode,
    /// Whom to trust. As libpq does: one that is given is used, also where the mode alone would not ask for one.
    pub root: Option<RootCert>,
    /// The client's certificate, a PEM file with its chain; libpq's `sslcert`.
    pub certificate: Option<PathBuf>,
    /// The certificate's key, a PEM file; libpq's `sslkey`.
    pub key: Option<PathBuf>,
}

impl TlsSettings {
    /// The parameters that are taken.
    pub const PARAMETERS: [&str; 4] = ["sslmode", "sslrootcert", "sslcert", "sslkey"];

    /// Takes a parameter in; says whether it is one of these.
    ///
    /// # Errors
    /// `Value` for an `sslmode` that does not exist.
    pub fn take(&mut self, name: &str, value: &str) -> Result<bool, ConfigError> {
        if !TlsSettings::PARAMETERS.contains(&name) {
            return Ok(false);
        }
        match name {
            "sslmode" => self.mode = ssl_mode(value)?,
            "sslrootcert" if value == "system" => self.root = Some(RootCert::System),
            "sslrootcert" => self.root = Some(RootCert::File(value.into())),
            "sslcert" => self.certificate = Some(value.into()),
            "sslkey" => self.key = Some(value.into()),
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// Whether the parameters go together.
    ///
    /// # Errors
    /// Names the parameter that is missing, or that does not fit to another one.
    pub fn check(&self) -> Result<(), ConfigError> {
        if self.certificate.is_some() != self.key.is_some() {
            let name = if self.certificate.is_some() { "sslkey" } else { "sslcert" };
            return Err(ConfigError::Missing(name));
        }
        if self.mode == SslMode::VerifyCa && self.root.is_none() {
            return Err(ConfigError::value("sslrootcert", "sslmode=verify-ca needs the authority's certificate here"));
        }
        if self.root == Some(RootCert::System) && self.mode != SslMode::VerifyFull {
            return Err(ConfigError::value(
                "sslmode",
                "sslrootcert=system needs sslmode=verify-full: anybody can get a certificate of a public authority",
            ));
        }
        Ok(())
    }

    /// The client's settings. Reads the certificate files, so it may block for a moment.
    ///
    /// # Errors
    /// What is wrong with which file, in words.
    pub fn client_config(&self) -> Result<ClientConfig, String> {
        let provider = Arc::new(aws_lc_rs::default_provider());
        let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .map_err(|error| error.to_string())?;
        let builder = if self.mode == SslMode::VerifyFull {
            builder.with_root_certificates(self.roots()?)
        } else {
            let trust = if self.root.is_some() || self.mode >= SslMode::VerifyCa {
                let roots = Arc::new(self.roots()?);
                let verifier = WebPkiServerVerifier::builder_with_provider(roots, Arc::clone(&provider)).build();
                Trust::Authority(verifier.map_err(|error| format!("sslrootcert: {error}"))?)
            } else {
                Trust::Anybody
            };
            builder.dangerous().with_custom_certificate_verifier(Arc::new(LenientVerifier { trust, provider }))
        };
        let (Some(certificate), Some(key)) = (&self.certificate, &self.key) else {
            return Ok(builder.with_no_client_auth());
        };
        let chain = certificates(certificate).map_err(|reason| format!("sslcert: {reason}"))?;
        let key = PrivateKeyDer::from_pem_file(key).map_err(|error| format!("sslkey: {error}"))?;
        builder.with_client_auth_cert(chain, key).map_err(|error| format!("sslcert: {error}"))
    }

    fn roots(&self) -> Result<RootCertStore, String> {
        let mut store = RootCertStore::empty();
        match &self.root {
            Some(RootCert::File(path)) => {
                for certificate in certificates(path).map_err(|reason| format!("sslrootcert: {reason}"))? {
                    store.add(certificate).map_err(|error| format!("sslrootcert: {error}"))?;
                }
            }
            Some(RootCert::System) | None => {
                store.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
            }
        }
        if store.is_empty() {
            return Err("sslrootcert: no trusted certificate was found".to_owned());
        }
        Ok(store)
    }
}

fn ssl_mode(text: &str) -> Result<SslMode, ConfigError> {
    Ok(match text {
        "disable" => SslMode::Disable,
        "allow" => SslMode::Allow,
        "prefer" => SslMode::Prefer,
        "require" => SslMode::Require,
        "verify-ca" => SslMode::VerifyCa,
        "verify-full" => SslMode::VerifyFull,
        _ => {
            let known = "must be disable, allow, prefer, require, verify-ca or verify-full";
            return Err(ConfigError::value("sslmode", known));
        }
    })
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let chain: Result<Vec<_>, _> = CertificateDer::pem_file_iter(path).map_err(|error| error.to_string())?.collect();
    match chain {
        Ok(chain) if chain.is_empty() => Err("the file holds no certificate".to_owned()),
        Ok(chain) => Ok(chain),
        Err(error) => Err(error.to_string()),
    }
}

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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed unwrap is the test's failure")]
    use super::*;

    fn settings(parameters: &[(&str, &str)]) -> TlsSettings {
        let mut settings = TlsSettings::default();
        for (name, value) in parameters {
            assert!(settings.take(name, value).unwrap(), "{name}");
        }
        settings
    }

    #[test]
    fn parameters_that_do_not_go_together_are_named() {
        let cases = [
            (vec![("sslcert", "x")], "sslkey"),
            (vec![("sslkey", "x")], "sslcert"),
            (vec![("sslmode", "verify-ca")], "sslrootcert"),
            (vec![("sslrootcert", "system"), ("sslmode", "require")], "sslmode"),
        ];
        for (parameters, named) in cases {
            let said = settings(&parameters).check().unwrap_err().to_string();
            assert!(said.contains(named), "{parameters:?}: {said}");
        }
        let good = [("sslmode", "verify-full"), ("sslrootcert", "system")];
        assert_eq!(settings(&good).check(), Ok(()));
        assert!(!TlsSettings::default().take("host", "x").unwrap());
        assert!(TlsSettings::default().take("sslmode", "maybe").is_err());
    }

    #[test]
    fn a_file_that_is_not_there_is_named_by_its_parameter() {
        for (name, parameters) in [
            ("sslrootcert", vec![("sslmode", "verify-full"), ("sslrootcert", "/nowhere/ca.pem")]),
            ("sslcert", vec![("sslcert", "/nowhere/c.pem"), ("sslkey", "/nowhere/k.pem")]),
        ] {
            let said = settings(&parameters).client_config().unwrap_err();
            assert!(said.starts_with(name), "{said}");
        }
    }
}
