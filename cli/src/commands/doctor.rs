//! `wallaby doctor`: is this source ready? Looks at the database itself and needs no controller.

use serde_json::{Value, json};
use wallaby_model::flow::{Failover, FlowDocument, SecretRef};
use wallaby_postgres_source::{ConnectConfig, Finding, PublicationWanted, SlotWanted, Status, preflight};

use super::read_flows;
use crate::args::{Doctor, Global, Output};
use crate::failure::Failure;
use crate::render;

/// One source to look at.
struct Patient {
    name: String,
    dsn: String,
    publication: PublicationWanted,
    slot: SlotWanted,
}

pub async fn run(global: &Global, options: &Doctor) -> Result<(), Failure> {
    let patients = patients(global, options)?;
    let mut failed = false;
    let mut values: Vec<Value> = Vec::new();
    for patient in &patients {
        let config = ConnectConfig::parse(&patient.dsn).map_err(|error| Failure::Invalid(error.to_string()))?;
        let findings = preflight(&config, &patient.publication, &patient.slot).await;
        failed |= findings.iter().any(|finding| matches!(finding.status, Status::Fail));
        match global.output {
            Output::Table => render::print(&findings_text(&patient.name, &findings))?,
            _ => values.push(json!({
                "source": patient.name,
                "findings": findings.iter().map(finding_value).collect::<Vec<_>>(),
            })),
        }
    }
    if global.output != Output::Table {
        render::print_value(global.output, &Value::Array(values))?;
    }
    if failed { Err(Failure::Findings) } else { Ok(()) }
}

fn patients(global: &Global, options: &Doctor) -> Result<Vec<Patient>, Failure> {
    if let Some(file) = &options.file {
        let flows = read_flows(std::slice::from_ref(file))?;
        return flows.iter().map(|flow| patient_of(global, &flow.document)).collect();
    }
    let Some(dsn) = &options.dsn else {
        return Err(Failure::Invalid("give --dsn or -f".to_owned()));
    };
    Ok(vec![Patient {
        name: "--dsn".to_owned(),
        dsn: dsn.clone(),
        publication: PublicationWanted {
            name: options.name.clone(),
            create: true,
            tables: options.tables.clone(),
            exclude: Vec::new(),
        },
        slot: SlotWanted {
            name: options.name.clone(),
            create: true,
            failover: Failover::Auto,
            timeout: global.timeout,
        },
    }])
}

fn patient_of(global: &Global, flow: &FlowDocument) -> Result<Patient, Failure> {
    let source = &flow.spec.source.postgres;
    let name = flow.metadata.name.to_string();
    let dsn = match &source.dsn {
        SecretRef::Value(value) => value.clone(),
        SecretRef::Env(variable) => std::env::var(variable).map_err(|_| {
            Failure::Invalid(format!(
                "flow {name} takes its dsn from ${variable}, which is not set here: set it as on the workers"
            ))
        })?,
        SecretRef::File(path) => std::fs::read_to_string(path).map_err(|error| {
            Failure::Invalid(format!(
                "flow {name} takes its dsn from the file {path}, which cannot be read here: {error}"
            ))
        })?,
    };
    Ok(Patient {
        name: format!("flow {name}"),
        dsn: dsn.trim().to_owned(),
        publication: PublicationWanted {
            name: flow.publication_name(),
            create: source.publication.create,
            tables: source.publication.tables.clone(),
            exclude: source.publication.exclude.clone(),
        },
        slot: SlotWanted {
            name: flow.slot_name(),
            create: source.slot.create,
            failover: source.slot.failover,
            timeout: global.timeout,
        },
    })
}

fn status_word(status: &Status) -> &'static str {
    match status {
        Status::Ok => "ok",
        Status::Warn => "warn",
        Status::Fail => "FAIL",
    }
}

fn findings_text(name: &str, findings: &[Finding]) -> String {
    let mut text = format!("{name}\n");
    for finding in findings {
        text.push_str(&format!("  {:<4}  {:<22} {}\n", status_word(&finding.status), finding.check, finding.message));
        for line in finding.remedy_sql.iter().flat_map(|sql| sql.lines()) {
            text.push_str(&format!("          {line}\n"));
        }
    }
    let count = |wanted: &str| findings.iter().filter(|finding| status_word(&finding.status) == wanted).count();
    let (fails, warns) = (count("FAIL"), count("warn"));
    let verdict = if fails == 0 { "ready" } else { "not ready" };
    text.push_str(&format!("  {verdict}: {fails} to mend, {warns} to look at\n"));
    text
}

fn finding_value(finding: &Finding) -> Value {
    json!({
        "check": finding.check,
        "status": status_word(&finding.status).to_lowercase(),
        "message": finding.message,
        "remedySql": finding.remedy_sql,
    })
}
