//! How a program is told where etcd is: the same flags and variables for every program of one installation.

use std::fmt;
use std::path::{Path, PathBuf};

use clap::Args;

use crate::error::{Error, Result};
use crate::options::{Options, Tls};

/// The flags and variables about etcd.
#[derive(Clone, Args)]
pub struct EtcdArguments {
    /// The etcd endpoints, separated by commas.
    #[arg(
        long = "etcd",
        env = "WALLABY_ETCD",
        value_name = "URLS",
        value_delimiter = ',',
        default_value = "http://127.0.0.1:2379"
    )]
    pub endpoints: Vec<String>,

    /// What every key in etcd starts with. All controllers and workers of one installation share it.
    #[arg(long = "etcd-prefix", id = "etcd_prefix", env = "WALLABY_ETCD_PREFIX", default_value = "/wallaby")]
    pub prefix: String,

    /// The certificate authority of the etcd servers, PEM; the platform's when absent.
    #[arg(long = "etcd-ca", id = "etcd_ca", env = "WALLABY_ETCD_CA", value_name = "FILE")]
    pub ca: Option<PathBuf>,

    /// The certificate that etcd is shown, PEM.
    #[arg(long = "etcd-cert", id = "etcd_cert", env = "WALLABY_ETCD_CERT", value_name = "FILE", requires = "etcd_key")]
    pub certificate: Option<PathBuf>,

    /// The key of the certificate that etcd is shown, PEM.
    #[arg(long = "etcd-key", id = "etcd_key", env = "WALLABY_ETCD_KEY", value_name = "FILE", requires = "etcd_cert")]
    pub key: Option<PathBuf>,

    /// The user at etcd, where etcd asks for one.
    #[arg(
        long = "etcd-user",
        id = "etcd_user",
        env = "WALLABY_ETCD_USER",
        value_name = "NAME",
        requires = "etcd_password_file"
    )]
    pub user: Option<String>,

    /// A file with the password of the user at etcd.
    #[arg(
        long = "etcd-password-file",
        id = "etcd_password_file",
        env = "WALLABY_ETCD_PASSWORD_FILE",
        value_name = "FILE",
        requires = "etcd_user"
    )]
    pub password_file: Option<PathBuf>,
}

impl EtcdArguments {
    /// Reads the files. The arguments are what [`crate::Coordination::connect`] takes beside the endpoints.
    ///
    /// # Errors
    /// `Settings` names a file that cannot be read, and TLS material without an endpoint that speaks TLS.
    pub fn options(&self) -> Result<Options> {
        let uses_tls = self.endpoints.iter().any(|endpoint| endpoint.starts_with("https://"));
        if !uses_tls && (self.ca.is_some() || self.certificate.is_some()) {
            let message = format!(
                "--etcd-ca and --etcd-cert are for endpoints that speak TLS, and {} does not begin with https://",
                self.shown()
            );
            return Err(Error::Settings(message));
        }
        let identity = match (&self.certificate, &self.key) {
            (Some(certificate), Some(key)) => Some((read(certificate)?, read(key)?)),
            _ => None,
        };
        let ca_pem = self.ca.as_deref().map(read).transpose()?;
        let tls = uses_tls.then_some(Tls { ca_pem, identity_pem: identity, domain: None });
        let user = match (&self.user, &self.password_file) {
            (Some(user), Some(file)) => {
                let password = String::from_utf8_lossy(&read(file)?).trim_end_matches(['\r', '\n']).to_owned();
                Some((user.clone(), password))
            }
            _ => None,
        };
        Ok(Options { prefix: self.prefix.clone(), tls, user, ..Options::default() })
    }

    /// The endpoints for messages.
    pub fn shown(&self) -> String {
        self.endpoints.join(", ")
    }
}

impl fmt::Debug for EtcdArguments {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EtcdArguments").field("endpoints", &self.endpoints).field("prefix", &self.prefix).finish()
    }
}

fn read(path: &Path) -> Result<Vec<u8>> {
    std::fs::read(path).map_err(|error| Error::Settings(format!("cannot read {}: {error}", path.display())))
}
